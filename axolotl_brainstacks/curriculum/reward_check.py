"""Loads the reward functions of an RL round, tries them on two examples before training, and checks what they return in it.

The argument `where` is the round's name in errors, e.g. "rl_rounds[0] of domain `math`".
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

RewardFunc = Callable[..., Any]

# What TRL passes by name to every reward function besides the columns of the data.
_PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")
_TRIED = ("", "The answer is 1.")
_LARGEST = 3.4028234663852886e38  # TRL keeps rewards in float32


def load_reward_funcs(names: Sequence[str], where: str) -> list[RewardFunc]:
    """Import the functions that `trl.reward_funcs` names, as Axolotl does, also from the working directory.

    Raises:
        ValueError: if a name is not that of an importable function, or TRL could not call the function.
    """
    if isinstance(names, str) or not names:
        raise ValueError(
            f"`trl.reward_funcs` of {where} is {names!r}; it must list functions, e.g. "
            "[axolotl_brainstacks.rewards.numeric_answer]"
        )
    # `python -m axolotl.cli.train` has the working directory on its path; installed commands do not.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    return [_load(name, where) for name in names]


def _load(name: str, where: str) -> RewardFunc:
    said = f"`trl.reward_funcs` of {where}: `{name}`"
    if not isinstance(name, str) or "/" in name or Path(name).is_dir():
        raise ValueError(
            f"{said} looks like a reward model; an RL round takes functions that verify an answer alone, as a model's reward "
            "can be gamed: name one as module.function"
        )
    module_name, _, function_name = name.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{said} is no function's name; write it as module.function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{said}: the module `{module_name}` cannot be imported ({type(error).__name__}: {error}); it has to be installed, "
            f"or to be in the folder that the command runs in, {Path.cwd()}"
        ) from error
    if not hasattr(module, function_name):
        raise ValueError(f"{said}: the module `{module_name}` has no function `{function_name}`; correct the name")
    func = getattr(module, function_name)
    if not callable(func) or inspect.isclass(func):
        raise ValueError(
            f"{said} is a {type(func).__name__}, not a function; name one that takes prompts and completions"
        )
    _check_signature(func, dict.fromkeys(_PASSED), said)
    return func


def _check_signature(func: RewardFunc, passed: Mapping[str, Any], said: str) -> None:
    """Raises ValueError unless TRL can pass all of `passed` to `func` by name."""
    advice = "write it as def f(prompts, completions, **columns)"
    try:
        parameters = inspect.signature(func).parameters.values()
    except ValueError:
        raise ValueError(f"{said} does not say what it takes; {advice}") from None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name for parameter in parameters if parameter.kind in by_name}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    refused = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]
    refused += [name for name in passed if name not in named and not takes_any]
    if refused:
        raise ValueError(
            f"{said} does not take {', '.join(f'`{name}`' for name in refused)} by name, as TRL passes prompts, completions, "
            f"all columns and its own values; {advice}"
        )
    if len(parameters) < 2:  # Axolotl's own rule
        raise ValueError(f"{said} has to name `prompts` and `completions`; {advice}")


def check_rewards(funcs: Sequence[RewardFunc], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Call each function on the first two examples as TRL would, on each with an empty and with a short completion.

    Args:
        rows: the round's prepared examples, with a column `prompt`, as a list or a dataset.

    Raises:
        ValueError: if a function raises, needs a column that is missing, or does not return one finite number or None for
            each completion.
    """
    if not len(rows):
        raise ValueError(f"the data of {where} are empty: `datasets` needs examples with a `prompt`")
    tried = [dict(rows[index]) for index in range(min(2, len(rows))) for _ in _TRIED]
    if any("prompt" not in row for row in tried):
        raise ValueError(
            f"the examples of {where} have no column `prompt`, only {_quoted(tried[0])}: set `type: "
            "axolotl_brainstacks.question_answer` in `datasets`, or a transform of your own that makes one"
        )
    texts = [_TRIED[index % len(_TRIED)] for index in range(len(tried))]
    conversational = isinstance(tried[0]["prompt"], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    columns = {key: [row.get(key) for row in tried] for key in tried[0] if key not in _NOT_PASSED}
    passed = {
        **{"prompts": [row["prompt"] for row in tried], "completions": completions},
        **{"completion_ids": [[0] for _ in tried], **columns, "trainer_state": TrainerState()},
        **{"log_extra": lambda column, values: None, "log_metric": lambda name, value: None},
    }
    for func in funcs:
        said = f"`trl.reward_funcs` of {where}: `{_name(func)}`"
        _check_columns(func, passed, said)
        # A function may change what it is given.
        given = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in passed.items()}
        try:
            rewards = asyncio.run(func(**given)) if _is_async(func) else func(**given)
        except Exception as error:
            raise ValueError(
                f"{said} fails on the first examples of the data ({type(error).__name__}: {error}); their columns are "
                f"{_quoted(tried[0])}: correct the function or the data"
            ) from error
        bad: list[str] = []
        _checked_values(rewards, len(tried), said, bad.append)
        if bad:
            raise ValueError(f"{bad[0]}; return a finite number, or None where the reward does not apply")


def _check_columns(func: RewardFunc, passed: Mapping[str, Any], said: str) -> None:
    _check_signature(func, passed, said)
    for name, parameter in inspect.signature(func).parameters.items():
        optional = parameter.default is not inspect.Parameter.empty or parameter.kind in (
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        )
        if name not in passed and not optional:
            raise ValueError(
                f"{said} needs the column `{name}`, but the examples have {_quoted(passed, without=_PASSED)}: add the field "
                f"`{name}` to the data of `datasets`, or take the function out"
            )


def checked(func: RewardFunc, on_bad: Callable[[str], None]) -> RewardFunc:
    """Wrap a reward function for training, so that a reward that is not finite cannot spoil the weights.

    TRL treats NaN as a missing reward, but lets infinity through, which makes the advantages of the whole group NaN or
    infinite. The wrapper returns None, which TRL leaves out, for a reward that is not a finite float32, and calls `on_bad`
    with a description. The wrapper keeps the function's name and signature, and is a coroutine function if the function is.
    It raises ValueError for a wrong number of rewards.
    """
    said = f"the reward function `{_name(func)}`"

    if _is_async(func):

        @_like(func)
        async def watched_async(*args: Any, **kwargs: Any) -> list[float | None]:
            return _checked_values(await func(*args, **kwargs), len(kwargs["completions"]), said, on_bad)

        return watched_async

    @_like(func)
    def watched(*args: Any, **kwargs: Any) -> list[float | None]:
        return _checked_values(func(*args, **kwargs), len(kwargs["completions"]), said, on_bad)

    return watched


def _like(func: RewardFunc) -> Callable[[RewardFunc], RewardFunc]:
    def dressed(wrapper: RewardFunc) -> RewardFunc:
        functools.update_wrapper(wrapper, func)
        wrapper.__name__ = _name(func)
        return wrapper

    return dressed


def _checked_values(rewards: Any, count: int, said: str, on_bad: Callable[[str], None]) -> list[float | None]:
    """`rewards` as floats and None. Raises ValueError unless they are a sequence of `count` numbers or None."""
    if isinstance(rewards, str | bytes | Mapping) or not hasattr(rewards, "__iter__"):
        raise ValueError(f"{said} returned a {type(rewards).__name__}; return a list with one number per completion")
    values = list(rewards)
    if len(values) != count:
        raise ValueError(f"{said} returned {len(values)} rewards for {count} completions; return one per completion")
    return [_checked_value(value, said, on_bad) for value in values]


def _checked_value(value: Any, said: str, on_bad: Callable[[str], None]) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{said} returned {value!r:.100} as a reward; return numbers, or None where it does not apply"
        ) from None
    except OverflowError:  # an int beyond float
        number = math.inf
    if not abs(number) <= _LARGEST:  # NaN too
        on_bad(f"{said} returned the reward {number}")
        return None
    return number


def _name(func: RewardFunc) -> str:
    """The function's name, as TRL logs it."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def _is_async(func: RewardFunc) -> bool:
    """Whether TRL would await the function."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _quoted(names: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    return ", ".join(f"`{name}`" for name in names if name not in without) or "none"
