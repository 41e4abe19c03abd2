"""Reward functions of an RL round: found and tried before anything is computed, and watched while it trains."""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from axolotl_brainstacks.curriculum.reward_check import check_rewards, checked, load_reward_funcs
from axolotl_brainstacks.rewards import answer_format, exact_choice, numeric_answer

WHERE = "rl_rounds[0] of domain `math`"
ROWS = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i), "level": i} for i in range(3)]
TEXT_ROWS = [row | {"prompt": "?"} for row in ROWS]

OWN = """
def good(prompts, completions, **columns): return [1.0] * len(prompts)
def all_named(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, level):
    return [1.0] * len(prompts)
def only_answer(prompts, completions, answer): return [1.0] * len(prompts)
def no_prompts(completions, answer): return [1.0] * len(completions)
def positional(prompts, completions, /, **columns): return [1.0] * len(prompts)
def all_by_name(**columns): return [1.0] * len(columns["prompts"])
number = 3
class Reward: pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    name = f"own_rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package")
    (tmp_path / "reward_model").mkdir()
    return name


def test_functions_are_found_where_axolotl_finds_them(own_module: str) -> None:
    names = ["axolotl_brainstacks.rewards.numeric_answer", f"{own_module}.good", f"{own_module}.all_named"]
    funcs = load_reward_funcs(names, WHERE)
    assert funcs[0] is numeric_answer
    assert [func.__name__ for func in funcs[1:]] == ["good", "all_named"]
    check_rewards(funcs, ROWS, WHERE)


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("good", "no function's name", "module.function"),
        ("{own}.go od", "no function's name", "module.function"),
        ("{own}.", "no function's name", "module.function"),
        ("{own}.god", "no function `god`", "correct the name"),
        ("no_such_module.good", "`no_such_module` cannot be imported", "installed"),
        ("broken_rewards.good", "no_such_package", "installed"),
        ("{own}.number", "is a int", "takes prompts and completions"),
        ("{own}.Reward", "is a type", "takes prompts and completions"),
        ("{own}.only_answer", "`trainer_state`", r"\*\*columns"),
        ("{own}.no_prompts", "`prompts`", r"\*\*columns"),
        ("{own}.positional", "`prompts`, `completions`", r"\*\*columns"),
        ("{own}.all_by_name", "name `prompts`", r"\*\*columns"),
        ("org/reward-model", "reward model", "module.function"),
        ("reward_model", "reward model", "module.function"),
        (3, "`3`", "module.function"),
    ],
)
def test_a_name_that_is_no_reward_function(own_module: str, name: Any, problem: str, remedy: str) -> None:
    name = name.format(own=own_module) if isinstance(name, str) else name
    with pytest.raises(
        ValueError, match=rf"`trl.reward_funcs` of rl_rounds\[0\] of domain `math`.*{problem}.*{remedy}"
    ):
        load_reward_funcs([name], WHERE)


@pytest.mark.parametrize("names", [None, [], "axolotl_brainstacks.rewards.numeric_answer"])
def test_reward_funcs_must_be_a_list(names: Any) -> None:
    with pytest.raises(ValueError, match=r"`trl.reward_funcs` of rl_rounds\[0\].*must list"):
        load_reward_funcs(names, WHERE)


@pytest.mark.parametrize("rows", [ROWS, TEXT_ROWS, ROWS[:1], Dataset.from_list(ROWS), Dataset.from_list(TEXT_ROWS)])
def test_the_ready_rewards_pass(rows: Any) -> None:
    check_rewards([numeric_answer, exact_choice, answer_format], rows, WHERE)


def test_a_function_is_called_as_in_training() -> None:
    calls: list[dict[str, Any]] = []

    def seen(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, **columns})
        columns["log_metric"]("name", 1.0)
        columns["log_extra"]("name", [1] * len(prompts))
        columns["answer"].clear()
        return [0.0] * columns["trainer_state"].global_step or [0.0] * len(prompts)

    check_rewards([seen, seen], ROWS, WHERE)
    assert calls[0]["prompts"] == [ROWS[0]["prompt"]] * 2 + [ROWS[1]["prompt"]] * 2
    assert [turn[0]["content"] for turn in calls[1]["completions"]] == ["", "The answer is 1."] * 2
    assert calls[1]["level"] == [0, 0, 1, 1] and "prompt" not in calls[1] and len(calls[1]["completion_ids"]) == 4
    calls.clear()
    check_rewards([seen], TEXT_ROWS[:1], WHERE)
    assert calls[0]["completions"] == ["", "The answer is 1."]


def raising(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    raise KeyError("solution")


async def awaited(prompts: Any, completions: Any, **columns: Any) -> list[Any]:
    await asyncio.sleep(0)
    return [columns.get("reward", [1.0])[0]] * len(prompts)


@pytest.mark.parametrize(
    ("returned", "problem", "remedy"),
    [
        (1.0, "returned a float", "list"),
        ("1111", "returned a str", "list"),
        ({"a": 1}, "returned a dict", "list"),
        (None, "returned a NoneType", "list"),
        ([1.0], "1 rewards for 4 completions", "one per completion"),
        ([1.0] * 5, "5 rewards for 4 completions", "one per completion"),
        (["1"] * 4, "returned '1'", "numbers"),
        ([[1.0]] * 4, r"returned \[1.0\]", "numbers"),
        ([math.nan] * 4, "the reward nan", "finite"),
        ([1.0, 1.0, 1.0, -math.inf], "the reward -inf", "finite"),
        ([1e39] * 4, r"the reward 1e\+39", "finite"),
        ([10**400] * 4, "the reward inf", "finite"),
    ],
)
def test_a_function_that_returns_nonsense(returned: Any, problem: str, remedy: str) -> None:
    def nonsense(prompts: Any, completions: Any, **columns: Any) -> Any:
        return returned

    with pytest.raises(ValueError, match=rf"`trl.reward_funcs` of rl_rounds\[0\].*`nonsense`.*{problem}.*{remedy}"):
        check_rewards([answer_format, nonsense], ROWS, WHERE)


@pytest.mark.parametrize(
    "returned", [[1, None, True, Fraction(1, 2)], (1.0,) * 4, torch.ones(4), [torch.tensor(1.0)] * 4, iter([0.0] * 4)]
)
def test_what_trl_takes_for_rewards_passes(returned: Any) -> None:
    check_rewards([lambda prompts, completions, **columns: returned], ROWS, WHERE)


def test_a_function_that_raises_lacks_a_column_or_gets_no_rows() -> None:
    with pytest.raises(ValueError, match=r"`raising` fails.*KeyError: 'solution'.*`answer`, `level`.*correct"):
        check_rewards([raising], ROWS, WHERE)
    with pytest.raises(ValueError, match=r"column `answer`.*`level`"):
        check_rewards([numeric_answer], [{"prompt": "?", "level": 3}], WHERE)

    def needs_solution(prompts: Any, completions: Any, solution: Any, **columns: Any) -> list[float]:
        return [1.0] * len(prompts)

    with pytest.raises(ValueError, match=r"`needs_solution` needs the column `solution`.*have `answer`, `level`: add"):
        check_rewards([needs_solution], ROWS, WHERE)
    with pytest.raises(ValueError, match=r"the data of rl_rounds\[0\].* are empty"):
        check_rewards([numeric_answer], [], WHERE)
    with pytest.raises(ValueError, match=r"no column `prompt`, only `question`.*`type:.*question_answer`"):
        check_rewards([numeric_answer], [{"question": "?"}], WHERE)


def test_async_functions() -> None:
    check_rewards([awaited], ROWS, WHERE)
    with pytest.raises(ValueError, match=r"`awaited`.*the reward nan"):
        check_rewards([awaited], [row | {"reward": math.nan} for row in ROWS], WHERE)


class Judge:
    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[Any]:
        return columns["rewards"]


def returns(prompts: Any, completions: Any, rewards: Any, **columns: Any) -> Any:
    return rewards


@pytest.mark.parametrize("func", [returns, awaited, Judge(), functools.partial(returns, extra=1), numeric_answer])
def test_a_watched_function_looks_the_same(func: Any) -> None:
    watched = checked(func, pytest.fail)
    assert get_callable_name(watched) == get_callable_name(func)
    assert is_async_callable(watched) == is_async_callable(func) == (func is awaited)
    assert inspect.signature(watched) == inspect.signature(func)


def spiked(prompts: Any, completions: Any, **columns: Any) -> list[Any]:
    """Of every group of four: good, endless, left out, and no number."""
    return [1.0, math.inf, None, math.nan] * (len(prompts) // 4)


def grpo_step(model: Path, folder: Path, func: Callable[..., Any]) -> dict[str, Any]:
    """What TRL logs of one step of GRPO in which `func` alone gives rewards."""
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        scale_rewards="none",
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    trainer = GRPOTrainer(str(model), func, args=config, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    logs: dict[str, Any] = trainer.state.log_history[0]
    logs["weights"] = all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    return logs


def test_nothing_infinite_reaches_the_loss(tiny_llama_dir: Path, tmp_path: Path) -> None:
    raw = grpo_step(tiny_llama_dir, tmp_path / "raw", spiked)
    assert not math.isfinite(raw["grad_norm"]) or not math.isfinite(raw["reward"])  # TRL itself lets it through
    bad: list[str] = []
    logs = grpo_step(tiny_llama_dir, tmp_path / "watched", checked(spiked, bad.append))
    assert [math.isfinite(logs[key]) for key in ("loss", "grad_norm", "reward")] == [True] * 3 and logs["weights"]
    assert logs["reward"] == logs["rewards/spiked/mean"] == 1.0
    assert len(bad) == 2 and all("`spiked`" in message for message in bad)
    assert "inf" in bad[0] and "nan" in bad[1]


def test_a_watched_function_with_a_wrong_number_of_rewards() -> None:
    watched = checked(lambda prompts, completions, **columns: [1.0], pytest.fail)
    with pytest.raises(ValueError, match="1 rewards for 2 completions"):
        watched(prompts=["?"] * 2, completions=["!"] * 2)
    watched = checked(awaited, pytest.fail)
    with pytest.raises(ValueError, match="`awaited` returned 2 rewards for 3 completions"):
        asyncio.run(watched(prompts=["?"] * 2, completions=["!"] * 3))
