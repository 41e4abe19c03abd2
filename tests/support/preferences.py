"""Preference rows that a tiny model can learn: answers in letters are better than answers in digits."""

import json
from pathlib import Path
from random import Random
from typing import Any

FORMAT = {"prompt_format": "{prompt}", "chosen_format": "{chosen}", "rejected_format": "{rejected}"}
PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", **FORMAT}
LABELLED = {
    **{"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"},
    **{"prompt_format": "{prompt}", "completion_format": "{completion}"},
}


def pairs(folder: Path, seed: int = 0) -> dict[str, Any]:
    """`datasets` and `test_datasets` of pairs, for an entry of `rl_rounds:`."""
    rng = Random(seed)

    def row(number: int) -> dict[str, Any]:
        good, bad = ("".join(rng.choices(letters, k=6)) for letters in ("abcd", "0123"))
        return {"prompt": f"Say {number} ", "chosen": good, "rejected": bad}

    return _datasets(folder, "pairs", [row(i) for i in range(40)], PAIRS)


def labelled(folder: Path, seed: int = 0) -> dict[str, Any]:
    """`datasets` and `test_datasets` of single answers that are good or bad, for KTO."""
    rng = Random(seed)

    def row(number: int) -> dict[str, Any]:
        good = number % 2 == 0
        answer = "".join(rng.choices("abcd" if good else "0123", k=6))
        return {"prompt": f"Say {number} ", "completion": answer, "label": good}

    return _datasets(folder, "labelled", [row(i) for i in range(40)], LABELLED)


def _datasets(folder: Path, name: str, rows: list[dict[str, Any]], form: dict[str, str]) -> dict[str, Any]:
    entries = []
    for part, chosen in (("train", rows[:32]), ("test", rows[32:])):
        path = folder / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        entries.append({"path": str(path), "ds_type": "json", "split": "train", "type": form})
    return {"datasets": entries[:1], "test_datasets": entries[1:]}
