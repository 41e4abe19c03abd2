"""Mistakes in `rl_rounds:`: each is one clear error before anything is loaded, and the library stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documents import blocks
from support.preferences import labelled, pairs
from test_bad_input import assert_refused, config, last_domain, start, trained  # noqa: F401

from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.overlay import check_overlay

REWARDS = {"reward_funcs": ["axolotl_brainstacks.rewards.numeric_answer"], "num_generations": 2}
ENTRY = r"rl_rounds\[0\] of domain `math`"


def questions(folder: Path, **columns: Any) -> dict[str, Any]:
    """`datasets` of questions for GRPO; every row has these columns besides its question."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", **columns}) + "\n" for i in range(12)))
    entry = {"path": str(path), "ds_type": "json", "split": "train", "type": "axolotl_brainstacks.question_answer"}
    return {"datasets": [entry], "val_set_size": 4}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rl": "ppo"}, r"brainstacks\.domains\.math\.rl_rounds\.0\.rl` is 'ppo': .*'dpo'"),
        ({}, r"brainstacks\.domains\.math\.rl_rounds\.0\.rl` is missing"),
        ({"rl": "dpo"}, rf"`datasets:` is missing in {ENTRY}; .*a prompt with a chosen and a rejected answer"),
        (
            {"rl": "dpo", "learing_rate": 1},
            rf"`learing_rate` of {ENTRY} is not an Axolotl key; did you mean `learning_rate`",
        ),
        ({"rl": "dpo", "load_in_4bit": True}, rf"`load_in_4bit` of {ENTRY} has to be the same for all domains"),
        ({"rl": "dpo", "reward_model": True}, rf"`reward_model` of {ENTRY} cannot be used"),
        (
            {"rl": "dpo", "brainstacks": {"samples": {"prompts": 1}}},
            rf"`brainstacks\.samples` of {ENTRY} has no effect",
        ),
        (
            {"rl": "dpo", "brainstacks": {"boosting": {"max_rounds": 2}}},
            rf"`brainstacks\.boosting\.max_rounds` of {ENTRY} has no effect",
        ),
        (
            {"rl": "kto", "micro_batch_size": 1, "datasets": [{"path": "x"}]},
            rf"`micro_batch_size` of {ENTRY} is 1; KTO",
        ),
        ({"rl": "dpo", "trainer_cls": "x.Y"}, rf"`trainer_cls` of {ENTRY} cannot be used"),
        (
            {"rl": "dpo", "brainstacks": {"eval_rows": 3}},
            r"brainstacks\.domains\.math\.rl_rounds\.0\.brainstacks\.eval_rows` is not a key",
        ),
    ],
    ids=str,
)
def test_keys(config: dict[str, Any], entry: dict[str, Any], message: str) -> None:  # noqa: F811
    last_domain(rl_rounds=[entry])(config)
    assert_refused(config, message)


@pytest.mark.parametrize(
    ("trl", "message"),
    [
        ({}, rf"`trl\.reward_funcs` is missing in {ENTRY}; .*axolotl_brainstacks\.rewards\.numeric_answer"),
        (REWARDS | {"use_vllm": True}, rf"`trl\.use_vllm` of {ENTRY} cannot be used"),
        (REWARDS | {"sync_ref_model": True}, rf"`trl\.sync_ref_model` of {ENTRY} cannot be used"),
        (REWARDS | {"reward_weights": [1.0, 2.0]}, rf"`trl\.reward_weights` of {ENTRY} has 2 values for 1"),
        (REWARDS | {"num_generations": 1}, rf"`trl\.num_generations` of {ENTRY} is 1"),
        (REWARDS | {"num_generations": 3}, rf"{ENTRY} is not valid: .*num_generations=3"),
        ({**REWARDS, "reward_funcs": ["nowhere.reward"]}, rf"{ENTRY}.*`nowhere\.reward`.*cannot be imported"),
        ({**REWARDS, "reward_funcs": ["math.no_such"]}, rf"{ENTRY}.*`math\.no_such`.*no function"),
        (
            {**REWARDS, "reward_funcs": ["bad_rewards.takes_nothing"]},
            rf"{ENTRY}.*`bad_rewards\.takes_nothing`.*prompts",
        ),
        ({**REWARDS, "reward_funcs": ["bad_rewards.raises"]}, rf"{ENTRY}.*`raises`.*RuntimeError: on purpose"),
        ({**REWARDS, "reward_funcs": ["bad_rewards.too_few"]}, rf"{ENTRY}.*`too_few`.*returned 1 rewards for 4"),
        ({**REWARDS, "reward_funcs": ["bad_rewards.not_a_number"]}, rf"{ENTRY}.*`not_a_number`.*nan"),
    ],
    ids=str,
)
def test_rewards(
    config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trl: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "bad_rewards.py").write_text(
        "def takes_nothing(**columns): return []\n"
        "def raises(prompts, completions, **columns): raise RuntimeError('on purpose')\n"
        "def too_few(prompts, completions, **columns): return [1.0]\n"
        "def not_a_number(prompts, completions, **columns): return [float('nan')] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    last_domain(rl_rounds=[{"rl": "grpo", "trl": trl, **questions(tmp_path, answer="1")}])(config)
    assert_refused(config, message)


def test_answers_that_do_not_fill_an_evaluation_batch(config: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    entry = {"rl": "grpo", "trl": REWARDS | {"num_generations": 4}, "gradient_accumulation_steps": 2}
    last_domain(rl_rounds=[entry | {"eval_batch_size": 6} | questions(tmp_path, answer="1")])(config)
    assert_refused(config, rf"`eval_batch_size` of {ENTRY} is 6, .*`trl\.num_generations` \(4\)")


def test_a_column_that_a_reward_function_misses(config: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    last_domain(rl_rounds=[{"rl": "grpo", "trl": REWARDS, **questions(tmp_path)}])(config)
    assert_refused(config, rf"{ENTRY}.*`numeric_answer`.*`answer`")


@pytest.mark.parametrize(("rl", "rows"), [("dpo", labelled), ("kto", pairs)], ids=["dpo", "kto"])
def test_rows_of_another_form(config: dict[str, Any], tmp_path: Path, rl: str, rows: Any) -> None:  # noqa: F811
    last_domain(rl_rounds=[{"rl": rl, **rows(tmp_path)}])(config)
    assert_refused(config, rf"The datasets of {ENTRY} .*cannot be loaded")


def test_what_is_right_is_accepted(config: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    grpo = {"rl": "grpo", "trl": REWARDS, **questions(tmp_path, answer="1")}
    last_domain(rl_rounds=[{"rl": "dpo", **pairs(tmp_path)}, grpo])(config)
    start(config)


def test_the_documents_show_a_domain_that_is_accepted() -> None:
    (shown,) = [text for page, text in blocks("yaml") if page.name == "rl.md"]
    block = BrainstacksBlock.parse({"domains": yaml.safe_load(shown)})
    (math,) = block.curriculum
    check_overlay(math)
    assert [entry.rl for entry in math.rl_rounds] == ["dpo", "kto", "grpo"]
    assert block.settings_of("math").boosting.max_rounds == 3
