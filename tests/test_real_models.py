"""Pretrained models, real text, 4-bit: short runs through Axolotl's train command."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.models import base_config
from support.processes import train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_brainstacks.evaluation import mean_loss, unpack_rows
from axolotl_brainstacks.library import Library


def real_config(model: Path, data: Path, output: Path, domains: list[str], **overrides: Any) -> dict[str, Any]:
    """A few steps on the demo's real text."""
    block = {
        "eval_rows": 8,
        "null_space": {"directions": 8, "samples": 8},
        "samples": {"prompts": 1, "max_new_tokens": 8},
        "boosting": {"max_rounds": 1},
        "domains": [
            {
                "name": name,
                "datasets": [{"path": str(data / name / "train.jsonl"), "ds_type": "json", "type": "chat_template"}],
                "test_datasets": [
                    {
                        "path": str(data / name / "test.jsonl"),
                        "ds_type": "json",
                        "type": "chat_template",
                        "split": "train[:8]",
                    }
                ],
            }
            for name in domains
        ],
    }
    config = base_config(
        model, output, adapter="brainstacks", brainstacks=block, lora_r=8, lora_alpha=8, sequence_len=160,
        max_steps=5, eval_steps=5, eval_on_start=False, eval_batch_size=4,
    )  # fmt: skip
    return config | overrides


@pytest.mark.timeout(1500)
def test_smollm2_learns_in_4_bit(smollm2_dir: Path, demo_data_dir: Path, tmp_path: Path) -> None:
    """Two steps: without a kernel for it, a CPU unpacks every weight in every forward."""
    config = real_config(
        smollm2_dir, demo_data_dir, tmp_path / "out", ["math"], load_in_4bit=True, max_steps=2, eval_steps=2
    )
    config["brainstacks"] |= {"eval_rows": 4, "samples": {"prompts": 0}}
    (domain,) = config["brainstacks"]["domains"]
    domain["test_datasets"][0]["split"] = "train[:4]"
    log = train(config, tmp_path, timeout=1200)
    assert re.search(r"4-bit layers: 210 of 210", log)
    library = Library.open(tmp_path / "out" / "library")
    assert library.verify() == []
    (entry,) = library.manifest.domains
    assert entry.rounds[-1].kept and entry.rounds[-1].loss_after < entry.base_loss

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, quantization_config=quantization, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
    loss = mean_loss(loaded, unpack_rows(library.validation("math")), 4)
    assert abs(loss - entry.rounds[-1].loss_after) < 1e-3


def test_gemma_trains_one_domain(gemma_dir: Path, demo_data_dir: Path, tmp_path: Path) -> None:
    train(real_config(gemma_dir, demo_data_dir, tmp_path / "out", ["medical"], max_steps=4), tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    (entry,) = library.manifest.domains
    assert library.verify() == []
    assert entry.rounds[-1].kept and entry.rounds[-1].loss_after < entry.base_loss
