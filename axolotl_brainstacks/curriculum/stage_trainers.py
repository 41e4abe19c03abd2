"""Tells Axolotl's trainer builder which trainer to make: the one that runs the curriculum, or, in a round, an ordinary one."""

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
    """While the block runs, Axolotl's builders make ordinary trainers, and other plugins see `cfg`, the round's config."""
    manager = PluginManager.get_instance()
    before, manager.cfg = manager.cfg, cfg
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)
        manager.cfg = before
