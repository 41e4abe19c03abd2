"""A run that is killed in a later epoch and resumed trains on the same examples in the same order, by the real command."""

from pathlib import Path
from typing import Any

import pytest
from support.agreement import with_engine
from support.curricula import contents, curriculum_config
from support.preferences import pairs
from support.processes import finish, kill_once_there, start_ranks, start_train
from support.rl_curricula import preferring, rewarded

# One evaluation before the first step and one at the end, so that the stack is that of the last step and not, perhaps, the
# best of the first epoch.
RULES: dict[str, Any] = {"max_steps": 14, "save_steps": 1, "eval_steps": 1000}
LENIENT = {"max_loss_increase": 50.0, "max_reward_drop": 50.0, "loss_spike": 50.0}
KEPT = {"boosting": {"max_rounds": 1, "min_loss_delta": 0.0}, "samples": {"prompts": 0}}


def supervised(model: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """40 rows, 5 steps an epoch."""
    return (
        curriculum_config(model, folder, ["chat"], **KEPT)
        | RULES
        | {"micro_batch_size": 8, "learning_rate": 2e-3}
        | keys
    )


def packed(model: Path, folder: Path) -> dict[str, Any]:
    return supervised(
        model, folder, sample_packing=True, eval_sample_packing=False, sequence_len=128, micro_batch_size=1
    )


def preferences(model: Path, folder: Path) -> dict[str, Any]:
    """32 pairs, 4 steps an epoch."""
    dpo = {"rl": "dpo", "learning_rate": 1e-3, "micro_batch_size": 8, **pairs(folder), **RULES}
    return preferring(curriculum_config(model, folder, ["chat"], **KEPT) | {"max_steps": 2}, dpo, rl=LENIENT)


def rewards(model: Path, folder: Path) -> dict[str, Any]:
    """48 prompts, 3 steps an epoch."""
    config = rewarded(model, folder, micro_batch_size=32, **RULES, learning_rate=1e-2)
    return config | {"max_steps": 2, "brainstacks": config["brainstacks"] | {"rl": LENIENT}}


@pytest.mark.parametrize(
    ("made", "engine", "number"),
    [
        *((supervised, "single", 1), (packed, "single", 1), (preferences, "single", 2), (rewards, "single", 2)),
        *((supervised, "zero2", 1), (rewards, "zero2", 2)),
    ],
)
def test_killed_in_a_later_epoch(tiny_llama_dir: Path, tmp_path: Path, made: Any, engine: str, number: int) -> None:
    config = made(tiny_llama_dir, tmp_path)
    if engine != "single":
        (part,) = config["brainstacks"]["domains"][0].get("rl_rounds", [config])
        part["micro_batch_size"] //= 2
        config = with_engine(config, engine, tmp_path)
    start = start_train if engine == "single" else start_ranks

    def run(name: str, kill_at: int | None = None) -> str:
        folder = tmp_path / name
        started = start(config | {"output_dir": str(folder)}, folder)
        processes = started if isinstance(started, list) else [started]
        if kill_at is None:
            return finish(processes, folder)
        kill_once_there(processes, folder / f"stages/chat-{number}/checkpoint-{kill_at}/brainstacks_guard.json")
        return (folder / "train.log").read_text()

    run("undisturbed")
    run("killed", kill_at=8)
    assert f"Resuming chat, round {number}" in run("killed")
    undisturbed, resumed = (contents(tmp_path / name / "library") for name in ("undisturbed", "killed"))
    assert undisturbed["domains"][0]["rounds"][-1]["kept"]
    assert resumed == undisturbed
