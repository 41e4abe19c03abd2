"""A domain of preference pairs (DPO) on top of a supervised one, by the real command."""

import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from processes import start_train, train, wait_for
from test_curriculum import curriculum_config
from test_interruption import contents
from transformers import AutoModelForCausalLM

from axolotl_brainstacks.library import Library

PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}


def preferring(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with a second domain in which answers in letters are better than answers in digits."""
    rng, files = Random(), []
    for part, count in (("train", 32), ("test", 8)):
        rows = [
            {
                "prompt": f"Say {i} ",
                "chosen": "".join(rng.choices("abcd", k=6)),
                "rejected": "".join(rng.choices("0123", k=6)),
            }
            for i in range(count)
        ]
        files.append(folder / f"pairs-{part}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = PAIRS | {"prompt_format": "{prompt}", "chosen_format": "{chosen}", "rejected_format": "{rejected}"}
    datasets = [{"path": str(file), "ds_type": "json", "split": "train", "type": form} for file in files]
    domain = {"name": "taste", "rl": "dpo", "datasets": datasets[:1], "test_datasets": datasets[1:]}
    config["brainstacks"]["domains"].append(domain)
    return config


def test_after_dpo_on_a_4_bit_base_the_next_domain_trains_in_fp32_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """TRL makes the stack in training bf16 there."""
    config = curriculum_config(tiny_llama_dir, tmp_path, ["math"], boosting={"max_rounds": 1})
    domains = preferring(config | {"load_in_4bit": True}, tmp_path)["brainstacks"]["domains"]
    train(config | {"load_in_4bit": True, "brainstacks": config["brainstacks"] | {"domains": domains[::-1]}}, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    in_bf16 = {
        stack.domain: all(
            tensor.equal(tensor.bfloat16().float())
            for key, tensor in library.stack_tensors(stack.name).items()
            if key.endswith("A.weight")  # B is folded in fp32 when it is frozen
        )
        for stack in library.manifest.stacks
    }
    assert in_bf16 == {"taste": True, "math": False}


def test_two_rounds_of_dpo_stopped_and_resumed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = preferring(curriculum_config(tiny_llama_dir, tmp_path, ["chat"]), tmp_path)
    config["brainstacks"]["domains"][1]["max_steps"] = 12
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    assert library.verify() == []
    taste = library.manifest.domain("taste")
    assert [record.kept for record in taste.rounds] == [True, True] and taste.done
    assert taste.rounds[0].loss_after < 0.6 < taste.rounds[0].loss_before
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
    assert len(loaded.base_model.stacks) == len(library.manifest.stacks)

    again = config | {"output_dir": str(tmp_path / "again"), "save_steps": 1000}
    (tmp_path / "second").mkdir()
    process = start_train(again, tmp_path / "second")
    log = wait_for([process], tmp_path / "second", "taste/round1/loss")
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    train(again, tmp_path / "second")
    assert "Resuming taste, round 1" in log.read_text()
    assert contents(tmp_path / "again" / "library") == contents(library.path)
