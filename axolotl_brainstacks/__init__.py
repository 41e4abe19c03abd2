"""Brainstacks for Axolotl: frozen MoE-LoRA stacks per domain, a null space between them, and a router.

Importing this package makes PEFT know the type ``BRAINSTACKS`` and costs nothing by itself: where PEFT is not imported
yet (``axolotl --help``), registration waits for that import.
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
    """Runs our registration right after the first ``import peft``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        # Asked anew each time: Transformers looks for PEFT's spec to see whether it is installed, long before it loads it.
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
    from axolotl_brainstacks.serving.registration import register_peft_type

    register_peft_type()


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())


def __getattr__(name: str) -> Any:
    if name == "BrainstacksPlugin":
        from axolotl_brainstacks.plugin import BrainstacksPlugin

        return BrainstacksPlugin
    if name == "question_answer":  # Axolotl finds a transform in a top-level module only: `type: module.function`
        from axolotl_brainstacks.rewards.data import question_answer

        return question_answer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
