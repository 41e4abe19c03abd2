"""A user's mistake under one of Axolotl's commands ends in one line on stderr instead of a traceback."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from axolotl_brainstacks import distributed
from axolotl_brainstacks.guarded import printable

_PACKAGE = __name__.partition(".")[0]
# Here an error is raised that every rank has: see `on_main`, `on_every_rank` and `check_same`.
_SHARED = distributed.__name__
_RAISE = dis.opmap["RAISE_VARARGS"]

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class OneLine:
    """A `sys.excepthook` for the errors that this package raises on purpose; all others go on to the hook before it.

    otherwise: the hook before it. clean_up: called before the line is printed.
    """

    def __init__(self, otherwise: Hook, clean_up: Callable[[], None]) -> None:
        self.otherwise, self.clean_up = otherwise, clean_up

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        module = _raised_by(traceback) if isinstance(error, ValueError | OSError) else ""
        if module.partition(".")[0] != _PACKAGE:
            self.otherwise(kind, error, traceback)
            return
        stderr = sys.stderr  # which cleaning up may replace
        self.clean_up()
        if _speaks(module):
            print(f"Error: {printable(error)}", file=stderr, flush=True)


def install(clean_up: Callable[[], None]) -> None:
    """From now on such errors end in one line. Replaces what an earlier call installed."""
    uninstall()
    sys.excepthook = OneLine(sys.excepthook, clean_up)


def uninstall() -> None:
    """Put the hook before ours back, where ours is still the outermost."""
    if isinstance(sys.excepthook, OneLine):
        sys.excepthook = sys.excepthook.otherwise


def _raised_by(traceback: TracebackType | None) -> str:
    """The module whose `raise` statement made the error; "" where something else did, such as a call of `int`."""
    if traceback is None:
        return ""
    while traceback.tb_next:
        traceback = traceback.tb_next
    if traceback.tb_frame.f_code.co_code[traceback.tb_lasti] != _RAISE:
        return ""
    return str(traceback.tb_frame.f_globals.get("__name__", ""))


def _speaks(module: str) -> bool:
    """Whether this rank prints the error: the first one of a machine always, others what they alone may have.

    Before the ranks know each other they all read the same config, and all find the same mistake in it.
    """
    together = distributed.world_size() > 1
    return os.environ.get("LOCAL_RANK", "0") == "0" or (together and module != _SHARED)
