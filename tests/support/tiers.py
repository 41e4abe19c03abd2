"""The tier of a test, found from what it can start, so that a new test needs no label.

`distributed` tests start two ranks; `slow` ones run Axolotl or prepare the demo's models, or carry the marker `slow`
because they take long; all others are `fast`.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
TWO_RANKS = {"start_ranks", "train_ranks", "as_rank"}
# Config loading and inference run in the process of the test.
LONG_RUNS = {"start_train", "run_axolotl", "load_cfg", "do_inference", "prepare_model", "prepare_data"}


def tier(item: pytest.Function) -> str:
    """`distributed`, `slow` or `fast`, from the functions that a test and its fixtures can reach."""
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    names = {name for function in (item.function, *fixtures) for name in reachable(function)}
    if names & TWO_RANKS or item.get_closest_marker("distributed"):
        return "distributed"
    return "slow" if names & LONG_RUNS or item.get_closest_marker("slow") else "fast"


@functools.cache
def reachable(function: Callable[..., Any]) -> frozenset[str]:
    """Names of all functions that `function` calls by a global name, itself, and through functions of the tests."""
    todo, seen, names = [inspect.unwrap(function)], set(), set()
    while todo:
        current = todo.pop()
        if not isinstance(current, FunctionType) or current in seen:
            continue
        seen.add(current)
        names.add(current.__name__)
        if Path(current.__code__.co_filename).is_relative_to(TESTS):
            todo += [inspect.unwrap(found) for found in _callables(current)]
    return frozenset(names)


def _callables(function: FunctionType) -> Iterator[Callable[..., Any]]:
    """What the code of `function` reads from its module's globals and can be called; methods stand for their class."""
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            value = function.__globals__.get(instruction.argval) if instruction.opname == "LOAD_GLOBAL" else None
            if isinstance(value, type):
                yield from (member for member in vars(value).values() if inspect.isfunction(member))
            elif callable(value):
                yield value


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code object and those of the functions, lambdas and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
