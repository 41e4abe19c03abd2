"""Brainstacks for Axolotl: frozen MoE-LoRA stacks per domain, a null space between them, and a router.

Importing this package registers the adapter type ``BRAINSTACKS`` with PEFT. If PEFT is not imported yet, the registration waits
for that import, so that commands such as ``axolotl --help`` do not have to load PEFT.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["BrainstacksPlugin", "question_answer"]


class _RegisterAfterPeft(importlib.abc.MetaPathFinder):
    """An import hook that registers our adapter type right after the first ``import peft``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        # Every request gets a new spec, and the hook stays until a module is executed: Transformers asks for PEFT's spec just to
        # see whether it is installed. The hook is out of the way meanwhile, so that `importlib` finds the real spec.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()
                sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from axolotl_brainstacks.adapter.registration import register_peft_type

    register_peft_type(_load_tuner)


def _load_tuner() -> type:
    from axolotl_brainstacks.serving.model import BrainstacksModel

    return BrainstacksModel


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())


def __getattr__(name: str) -> Any:
    """Import the package's public names when they are first used, as they need Axolotl or Datasets."""
    if name == "BrainstacksPlugin":
        from axolotl_brainstacks.plugin import BrainstacksPlugin

        return BrainstacksPlugin
    if name == "question_answer":
        # Axolotl looks up the transform of an RL dataset as `type: module.function`, in a top-level module only.
        from axolotl_brainstacks.rewards.data import question_answer

        return question_answer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
