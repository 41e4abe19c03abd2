"""Tiny curricula: domains of random rows, and what a library that was made of them contains."""

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from support.models import base_config, chat_dataset

ALPHABETS = {"chat": "abcd", "code": "WXYZ", "math": "0123", "legal": "%&#+"}


def write_domain(path: Path, name: str, count: int, rng: Random) -> Path:
    """Chat rows whose answers use letters of this domain alone, so that every domain has something of its own to learn."""
    letters = ALPHABETS[name]
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(rng.choices(letters, k=6))
            turns = [{"role": "user", "content": f"Double {word}"}, {"role": "assistant", "content": word * 2}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def curriculum_config(model: Path, folder: Path, names: list[str], **block: Any) -> dict[str, Any]:
    """Two short rounds per domain on random rows, the same for the same domains."""
    rng = Random(" ".join(names))
    domains = []
    for name in names:
        rows = write_domain(folder / f"{name}.jsonl", name, 40, rng)
        held_out = write_domain(folder / f"{name}-test.jsonl", name, 8, rng)
        domains.append(
            {
                "name": name,
                "datasets": [chat_dataset(rows)],
                "test_datasets": [chat_dataset(held_out) | {"split": "train"}],
            }
        )
    config = base_config(
        model, folder / "out", adapter="brainstacks", max_steps=8, eval_steps=4, save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    del config["save_strategy"]
    block = {
        "null_space": {"directions": 8, "samples": 16},
        "samples": {"prompts": 1, "max_new_tokens": 4},
        "boosting": {"max_rounds": 2, "min_loss_delta": 0.0},
        **block,
    }
    return config | {"brainstacks": {**block, "domains": domains}}


def contents(library: Path) -> dict[str, Any]:
    """What a library holds: hashes of all stacks, null spaces and rows, and every loss."""
    manifest = json.loads((library / "manifest.json").read_text())
    forgetting = json.loads((library / "report/forgetting.json").read_text())
    files = sorted(
        path for folder in ("stacks", "nullspace", "validation") for path in (library / folder).rglob("*.safetensors")
    )
    hashes = {str(path.relative_to(library)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"domains": manifest["domains"], "hashes": hashes, "forgetting": forgetting}
