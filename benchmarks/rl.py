"""RL rounds on a real model and real rows: SmolLM2-135M-Instruct, on a CPU.

    python benchmarks/rl.py dpo  [--engine single|zero2] [--four-bit] [--steps 20]
    python benchmarks/rl.py grpo [--engine single|zero2] [--four-bit] [--steps 30] [--seeds 1 2] [--learning-rate 1e-3]

dpo: two of the demo's domains, math and medical. Each learns from 16 pairs a step: the right answer to a question is
chosen, the answer to another question of its kind is rejected. Preferred means: of the two answers the right one has the
higher mean log-probability per token, on held-out pairs.

grpo: sums from reasoning-gym; an answer earns 1 when its last number is right. The held-out reward is the mean over
held-out questions of 4 sampled answers each, before and after, with the same random numbers.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")
sys.path.insert(1, str(Path(__file__).parents[1] / "example_configs"))

from demo_domains import load_reasoning_gym  # noqa: E402
from prepare_demo import prepare_data, prepare_model  # noqa: E402
from support.agreement import with_engine  # noqa: E402
from support.models import base_config, chat_dataset  # noqa: E402
from support.preferences import PAIRS  # noqa: E402
from support.processes import finish, start_ranks, start_train  # noqa: E402

from axolotl_brainstacks.library import Library  # noqa: E402

DEMO = Path(__file__).parents[1] / ".demo"
Message = dict[str, str]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(path: Path, kind: Any, split: str = "train") -> dict[str, Any]:
    return {"path": str(path), "ds_type": "json", "split": split, "type": kind}


def shared_config(model: Path, folder: Path, steps: int) -> dict[str, Any]:
    """What both runs have in common: a small supervised round, evaluated on few rows."""
    config = base_config(
        model, folder / "out", adapter="brainstacks", lora_r=16, lora_alpha=16, sequence_len=192, micro_batch_size=4,
        eval_batch_size=8, max_steps=steps, eval_steps=10, save_steps=1000, learning_rate=1e-3, warmup_steps=2,
        lr_scheduler="cosine", logging_steps=1,
    )  # fmt: skip
    del config["save_strategy"]
    return config


# Preference pairs


def pairs(folder: Path, domain: str, template: Any) -> dict[str, Any]:
    """`datasets` and `test_datasets` of pairs made of the demo's rows: no prompt of a test pair is trained on."""
    rng, entries = Random(domain), []
    for part, count in (("train", 160), ("test", 32)):
        rows = [json.loads(line)["messages"] for line in (DEMO / "data" / domain / f"{part}.jsonl").open()][:count]
        made = []
        for turns in rows:
            wrong = rng.choice([other for other in rows if other[-1]["content"] != turns[-1]["content"]])
            prompt = template(turns[:-1], add_generation_prompt=True)
            chosen, rejected = (template([*turns[:-1], answer[-1]]).removeprefix(prompt) for answer in (turns, wrong))
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        path = jsonl(folder / f"{domain}-{part}-pairs.jsonl", made)
        form = PAIRS | {"prompt_format": "{prompt}", "chosen_format": "{chosen}", "rejected_format": "{rejected}"}
        entries.append(entry(path, form))
    return {"datasets": entries[:1], "test_datasets": entries[1:]}


def dpo_config(model: Path, folder: Path, steps: int, seed: int, learning_rate: float) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def template(turns: list[Message], **options: Any) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    domains = []
    for name in ("math", "medical"):
        rows, held_out = (chat_dataset(DEMO / "data" / name / f"{part}.jsonl") for part in ("train", "test"))
        rl = {"rl": "dpo", "rl_beta": 0.1, "learning_rate": learning_rate, "micro_batch_size": 4, "eval_batch_size": 8}
        domains.append(
            {
                "name": name,
                "datasets": [rows],
                "test_datasets": [held_out | {"split": "train[:24]"}],
                "rl_rounds": [rl | pairs(folder, name, template)],
            }
        )
    block = {"boosting": {"max_rounds": 1}, "null_space": {"directions": 16, "samples": 24}, "samples": {"prompts": 0}}
    return shared_config(model, folder, steps) | {"seed": seed, "brainstacks": block | {"domains": domains}}


def preferred(base: Path, library: Library, domain: str, folder: Path, without_rl: bool) -> float:
    """Share of held-out pairs whose right answer is likelier per token, with or without the domain's RL stack."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from axolotl_brainstacks.evaluation import Example, row_losses

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(library.path)
    )
    chosen = library.manifest.domain(domain)
    rl_stacks = {record.stack for record in chosen.rounds if record.rl}
    stacks = [name for name in chosen.context if not (without_rl and name in rl_stacks)]
    losses = []
    lines = [json.loads(line) for line in (folder / f"{domain}-test-pairs.jsonl").open()]
    with model.base_model.using_stacks(stacks):
        for side in ("chosen", "rejected"):
            rows = []
            for line in lines:
                prompt, answer = (
                    tokenizer(line[key], add_special_tokens=False)["input_ids"] for key in ("prompt", side)
                )
                rows.append(Example(prompt + answer, [-100] * len(prompt) + answer))
            losses.append([total / tokens for total, tokens in row_losses(model, rows, 8)])
    return sum(good < bad for good, bad in zip(*losses, strict=True)) / len(lines)


# Sums


def sums(size: int, seed: int) -> list[dict[str, str]]:
    made = load_reasoning_gym().create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    return [{"question": item["question"], "answer": item["answer"]} for item in made]


def grpo_config(model: Path, folder: Path, steps: int, seed: int, learning_rate: float) -> dict[str, Any]:
    rows = list({row["question"]: row for row in sums(700, 1)}.values())
    held_out, rest = rows[:48], rows[48:]

    def turns(row: dict[str, str]) -> dict[str, Any]:
        asked = {"role": "user", "content": row["question"]}
        return {"messages": [asked, {"role": "assistant", "content": row["answer"]}]}

    parts = {"train": rest[:200], "test": held_out}
    files = [jsonl(folder / f"{part}.jsonl", [turns(row) for row in chosen]) for part, chosen in parts.items()]
    parts["train"] = rest[200:]
    asked = [jsonl(folder / f"{part}-questions.jsonl", chosen) for part, chosen in parts.items()]
    grpo = {
        "rl": "grpo",
        "max_steps": steps,
        "learning_rate": learning_rate,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "eval_batch_size": 16,
        "eval_steps": 10,
        "datasets": [entry(asked[0], "axolotl_brainstacks.question_answer")],
        "test_datasets": [entry(asked[1], "axolotl_brainstacks.question_answer")],
        "trl": {
            "num_generations": 4,
            "max_completion_length": 8,
            "beta": 0.0,
            "reward_funcs": ["axolotl_brainstacks.rewards.numeric_answer"],
        },
    }
    domain = {
        "name": "sums",
        "datasets": [chat_dataset(files[0])],
        "test_datasets": [chat_dataset(files[1]) | {"split": "train"}],
        "rl_rounds": [grpo],
    }
    block = {"boosting": {"max_rounds": 1}, "samples": {"prompts": 0}, "rl": {"max_loss_increase": 0.5}}
    return shared_config(model, folder, 20) | {"seed": seed, "brainstacks": block | {"domains": [domain]}}


def rewards(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"'sums/round2/reward': '?(-?[\d.e-]+)", log)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["dpo", "grpo"])
    parser.add_argument("--engine", choices=["single", "zero2"], default="single")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--learning-rate", type=float, default=None)
    options = parser.parse_args()
    model = prepare_model("smollm2", DEMO)
    prepare_data(DEMO)
    for seed in options.seeds:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make = dpo_config if options.kind == "dpo" else grpo_config
            rate = options.learning_rate or (2e-4 if options.kind == "dpo" else 3e-4)
            config = make(model, folder, options.steps or 20, seed, rate) | {"load_in_4bit": options.four_bit}
            if options.engine == "zero2":
                config = with_engine(config, "zero2", folder)
                processes = start_ranks(config, folder)
            else:
                processes = [start_train(config, folder)]
            log = finish(processes, folder, timeout=6 * 3600)
            library = Library.open(folder / "out" / "library")
            assert library.verify() == []
            print(f"seed {seed}, {options.engine}{', 4-bit base' if options.four_bit else ''}:")
            for chosen in library.manifest.domains:
                for record in chosen.rounds:
                    print(
                        f"  {chosen.name} round {record.round} {record.rl or 'supervised'}: validation loss "
                        f"{record.loss_before:.4f} -> {record.loss_after:.4f}, objective {record.objective_before} -> "
                        f"{record.objective_after}, {record.steps} steps, {record.stop_reason}, "
                        f"{'kept' if record.kept else record.dropped}"
                    )
                if options.kind == "dpo":
                    before, after = (
                        preferred(model, library, chosen.name, folder, without) for without in (True, False)
                    )
                    print(f"  {chosen.name}: right answer likelier on {before:.1%} of held-out pairs, then {after:.1%}")
            if options.kind == "grpo":
                print(f"  mean reward by step: {' '.join(f'{value:.2f}' for value in rewards(log))}")
            for stack in library.manifest.stacks:
                print(f"  {stack.name} {stack.files['adapter_model.safetensors'].sha256[:16]}")


if __name__ == "__main__":
    main()
