"""Inside the curriculum Axolotl builds ordinary trainers; outside it builds the one that runs the curriculum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

_INSIDE = ContextVar("brainstacks_inside_a_stage", default=False)


def inside_a_stage() -> bool:
    """Whether a round of the curriculum is under way, so that its trainer has to be an ordinary one."""
    return _INSIDE.get()


@contextmanager
def stage_trainers(cfg: DictDefault) -> Iterator[None]:
    """While inside, Axolotl's builders make ordinary trainers for `cfg`, and other plugins see it."""
    manager = PluginManager.get_instance()
    before, manager.cfg = manager.cfg, cfg
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)
        manager.cfg = before
