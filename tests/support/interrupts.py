"""What the tests of interrupts share: an exception at any chosen point of a call, as a signal would raise it."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

ERRORS = (KeyboardInterrupt, MemoryError, RuntimeError)


class Interrupted(Exception):
    """The call was interrupted."""


def _raise_at(point: int, error: type[BaseException], call: Callable[[], Any]) -> int:
    """Run `call`; raise at the given point. Returns the points passed, which are where the interpreter looks for signals:
    where a Python function begins or goes on, and where a compiled one has returned."""
    passed = 0

    def look(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed += 1
            if passed == point:
                raise error

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return passed


def points_of(call: Callable[[], Any]) -> int:
    return _raise_at(-1, RuntimeError, call)


def interrupted(point: int, error: type[BaseException], call: Callable[[], Any]) -> bool:
    """Run `call` with an exception at `point`; whether it came through."""
    try:
        _raise_at(point, error, call)
    except BaseException as raised:
        if not isinstance(raised, (*ERRORS, ValueError, SystemError)):
            raise
        return True
    return False
