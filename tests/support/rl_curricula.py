"""Tiny curricula with rounds of preference learning and of GRPO."""

import json
from pathlib import Path
from typing import Any

from axolotl_brainstacks.library import Library
from support.curricula import curriculum_config


def preferring(config: dict[str, Any], *rl_rounds: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """`config` with RL rounds in its first domain."""
    first, *others = config["brainstacks"]["domains"]
    domains = [first | {"rl_rounds": list(rl_rounds)}, *others]
    return config | {"brainstacks": config["brainstacks"] | {"domains": domains} | settings}


def stack_hashes(library: Library) -> dict[str, str]:
    return {stack.name: stack.files["adapter_model.safetensors"].sha256 for stack in library.manifest.stacks}


def rewarded(model: Path, folder: Path, reward: str = "letters", **keys: Any) -> dict[str, Any]:
    """A config with one supervised round and one of GRPO."""
    files = []
    for part, count in (("train", 48), ("test", 8)):
        files.append(folder / f"questions-{part}.jsonl")
        files[-1].write_text("".join(json.dumps({"question": f"Say {part} {i}"}) + "\n" for i in range(count)))
    entries = [
        {"path": str(file), "ds_type": "json", "split": "train", "type": "axolotl_brainstacks.question_answer"}
        for file in files
    ]
    grpo = {
        "rl": "grpo",
        "max_steps": 16,
        "eval_steps": 4,
        "learning_rate": 2e-2,
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "eval_batch_size": 16,
        "datasets": entries[:1],
        "test_datasets": entries[1:],
        "trl": {
            "num_generations": 4,
            "max_completion_length": 6,
            "beta": 0.0,
            "reward_funcs": [f"support.odd_rewards.{reward}"],
        },
        **keys,
    }
    config = curriculum_config(model, folder, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    return preferring(config, grpo, rl={"max_loss_increase": 5.0})
