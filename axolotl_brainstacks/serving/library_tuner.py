"""A tuner whose frozen stacks lie in a library: it reads those that a forward needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME
from torch import Tensor, nn

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.selection import FrozenStack
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.router.router import Router
from axolotl_brainstacks.serving.residency import ResidentStacks, check_root

MODES = ("auto", "routed", "ungated", "base")


class LibraryTuner(StackTuner):
    """`StackTuner` with a library behind it.

    Interrupts: where one came while memory was being changed, the library's stacks are read anew.

    Attributes:
        resident: the stacks in memory; None without a library.
        router: loaded by the first prompt that needs it.
        show_routes: whether `generate` tells its streamer which route it took.
    """

    resident: ResidentStacks | None
    router: Router | None
    show_routes: bool

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self._library: str | None = None
        self.resident = None
        self.router = None
        self.show_routes = False

    # The library

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, BrainstacksConfig)
        if config.library is not None and config.library != self._library:
            with self.lock:
                self._attach_library(config.library, getattr(model.config, "_name_or_path", "") or type(model).__name__)

    def _attach_library(self, path: str, model_name: str) -> None:
        if not Path(path).is_absolute():
            raise ValueError(
                f"`library` is {path!r}, which counts from the folder of its {CONFIG_NAME}; load it with "
                "`PeftModel.from_pretrained(model, folder)`, or make it absolute"
            )
        if self.stacks:
            raise ValueError(f"The model has stacks already; attach {path} to a fresh base model")
        library = Library.open(path)
        check_root(library)
        library.manifest.base.check(BaseModelInfo.of(self.model, model_name))
        self.set_frozen_dtype(library.manifest.frozen_dtype)
        self.resident = ResidentStacks(self, library)
        self._settle_before_forwards()
        self.selection.stacks = tuple(FrozenStack(entry.name, entry.domain) for entry in library.manifest.active_stacks)
        self.mode = os.environ.get("BRAINSTACKS_MODE", "auto")
        self._library = path  # last: only a library that is attached whole counts as attached

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError also for a tensor beside a config that names a library, and for one that is not attached."""
        assert isinstance(config, BrainstacksConfig)
        tuner = getattr(model, "base_model", model)
        if config.library is not None:
            if state_dict:
                raise ValueError(
                    f"The weights beside an {CONFIG_NAME} that names a library hold {next(iter(state_dict))!r}, but they "
                    "must be empty, as all weights come from its stacks: restore the file from a copy of the library"
                )
            if isinstance(tuner, LibraryTuner) and tuner._library != config.library:
                raise ValueError(
                    f"The library {config.library!r} is not attached, perhaps as its load was interrupted: load the base "
                    "model and the library again"
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _bring_into_memory(self, names: Sequence[str]) -> None:
        if self.resident is not None:
            self.resident.ensure(names)

    def _before_attaching(self) -> None:
        if self.resident is not None:  # a stack on top of a library comes after all of it
            self._switch_to(self._selection(None))

    def _settle_if_free(self) -> None:
        """With a library behind the model nothing must be read from disk now: perhaps no forward will need it."""
        if self.resident is None:
            self._settle()

    def _take_out(self, name: str) -> None:
        if self.resident is not None:
            self.resident.forget(name)
        super()._take_out(name)

    # Which stacks answer

    @property
    def mode(self) -> str:
        """Which stacks are on when no one has chosen.

        auto: `generate` routes every prompt if the library has a router; a plain forward has all stacks on.
        routed: both route. ungated: all stacks on in both. base: none.
        Reads "chosen" after `use_stacks`. The environment variable BRAINSTACKS_MODE is what a loaded library starts with.
        """
        return self.selection.wanted.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode (or BRAINSTACKS_MODE) is {mode!r}; it must be one of {', '.join(MODES)}")
        with self.lock:
            self.selection.wanted = self._selection([] if mode == "base" else None, mode=mode)
            self._settle_if_free()
