"""What a round starts from, when it ends, and when it is kept: by the real command on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.curricula import curriculum_config
from support.processes import train
from support.wrapped import tuner_of, wrap
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.curriculum.guard import Guard, Objective
from axolotl_brainstacks.curriculum.round import round_seed
from axolotl_brainstacks.curriculum.verdict import unusable
from axolotl_brainstacks.library import Library

ONE_ROUND = {"max_rounds": 1, "min_loss_delta": 0.0}


def with_entries(config: dict[str, Any], *entries: dict[str, Any]) -> dict[str, Any]:
    """`config` with more keys in the entries of its domains."""
    domains = [old | new for old, new in zip(config["brainstacks"]["domains"], entries, strict=True)]
    return config | {"brainstacks": config["brainstacks"] | {"domains": domains}}


def test_no_two_rounds_share_a_seed() -> None:
    seeds = {round_seed(7, domain, number) for domain in ("chat", "code", "chat1") for number in range(1, 12)}
    assert len(seeds) == 33 and all(0 <= seed < 2**31 for seed in seeds)


def test_settings_differ_by_domain_and_no_stack_starts_as_another_one(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = with_entries(
        curriculum_config(tiny_llama_dir, tmp_path, ["chat", "code", "math"], boosting=ONE_ROUND),
        {"brainstacks": {"boosting": {"max_rounds": 3}, "balance_coef": 0.5, "noisy_gate": False}},
        {"brainstacks": {"null_space": {"directions": 0}, "samples": {"prompts": 0}}},
        {},
    )
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    stacks = {domain: [s.name for s in library.manifest.stacks if s.domain == domain] for domain in ("chat", "code")}
    assert [len(library.manifest.domain(name).rounds) for name in ("chat", "code", "math")] == [3, 1, 1]
    configs = [library.stack_config(names[0]) for names in stacks.values()]
    assert [(config["balance_coef"], config["noisy_gate"]) for config in configs] == [(0.5, False), (0.01, True)]
    assert library.manifest.domain("math").rounds[0].metrics["null_space_leakage"] < 1e-6
    samples = (library.path / "report/samples.jsonl").read_text()
    assert '"domain": "chat"' in samples and '"domain": "code"' not in samples

    first = [library.stack_tensors(names[0]) for names in stacks.values()]
    for key in (key for key in first[0] if key.endswith("brainstacks_A.weight")):
        one, other = (tensors[key][8:].double() for tensors in first)  # 4 rows of gates and 4 of noise come first
        cosines = torch.nn.functional.cosine_similarity(one, other)
        assert cosines.abs().mean() < 0.3, key


def test_a_projection_that_learned_nothing_drops_its_round_and_the_run_goes_on(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """With o_proj at zero no gradient reaches v_proj."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in tiny_llama_dir.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    config = curriculum_config(folder, tmp_path, ["chat", "code"], boosting=ONE_ROUND)
    del config["lora_target_linear"]
    config["lora_target_modules"] = ["v_proj", "up_proj"]
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    assert [entry.done for entry in library.manifest.domains] == [True, True] and not library.manifest.stacks
    for entry in library.manifest.domains:
        (record,) = entry.rounds
        assert not record.kept and "v_proj" in str(record.dropped) and "all zero" in str(record.dropped)


def test_a_learning_rate_that_explodes_ends_the_round(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting=ONE_ROUND)
    train(config | {"learning_rate": 1e3, "eval_steps": 2, "eval_on_start": False}, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    (record,) = library.manifest.domain("chat").rounds
    assert record.stop_reason in ("spike", "non-finite loss") and record.steps < 8
    # A tiny model may fall to even odds for all tokens before, which can be better than its start.
    assert record.kept == (record.loss_after < record.loss_before) and library.verify() == []


def test_a_round_that_gains_too_little_is_dropped(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 3, "min_loss_delta": 50.0})
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    (record,) = library.manifest.domain("chat").rounds
    assert record.loss_after < record.loss_before and not record.kept and "below 50.0" in str(record.dropped)
    assert not library.manifest.stacks


@pytest.fixture
def guard() -> Guard:
    """It has seen a loss of 2 before the first step."""
    guard = Guard(tuner_of(wrap()), "default", patience=2, objective=Objective(worst_rise=0.1))
    assert evaluated(guard, 2.0) == "finished"
    return guard


def evaluated(guard: Guard, loss: float) -> str:
    """Why the round has ended after an evaluation."""
    control = TrainerControl()
    guard.on_evaluate(TrainingArguments("unused"), TrainerState(max_steps=4), control, metrics={"eval_loss": loss})
    assert control.should_training_stop == (guard.stop_reason != "finished")
    return guard.stop_reason


def test_a_first_evaluation_far_above_the_start_is_a_spike(guard: Guard) -> None:
    assert evaluated(guard, 2.2) == "spike"


def test_patience_counts_from_the_start(guard: Guard) -> None:
    assert [evaluated(guard, loss) for loss in (2.05, 2.01)] == ["finished", "patience"]


def test_a_closed_guard_says_no_more_why_its_round_ended(guard: Guard) -> None:
    guard.close()
    assert evaluated(guard, 3.0) == "finished"


def test_a_reward_may_fall_below_its_best_but_not_far_below_its_start() -> None:
    objective = Objective("eval_reward", -1, 0.2, from_start=True, reason="reward collapse")
    guard = Guard(tuner_of(wrap()), "default", patience=9, objective=objective, loss_spike=10.0)
    control, state, args = TrainerControl(), TrainerState(max_steps=9), TrainingArguments("unused")
    for reward, reason in ((0.5, "finished"), (0.9, "finished"), (0.35, "finished"), (0.25, "reward collapse")):
        guard.on_evaluate(args, state, control, metrics={"eval_reward": reward})
        assert guard.stop_reason == reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stack_that_is_not_finite_is_unusable(value: float) -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    keys = [f"base_model.model.layer.brainstacks_{side}.weight" for side in "AB"]
    assert unusable(dict(zip(keys, (a, b), strict=True))) is None
    b[1, 1] = value
    assert "NaN or infinite" in str(unusable(dict(zip(keys, (a, b), strict=True))))
