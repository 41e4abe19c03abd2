"""A tuner whose frozen stacks lie in a library on disk; it reads a stack when a forward first needs it."""

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
    """`StackTuner` with a library on disk, or without one when a stack is trained or loaded alone.

    Interrupts: if an exception arrives while stacks are moved in or out of memory, the next forward reads them again.

    Attributes:
        resident: the library's stacks that are in memory; None without a library.
        router: the library's router; None until a prompt first needs it.
        show_routes: whether `generate` writes the route to its streamer, before the answer.
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
        """Inject an adapter as PEFT does; then attach the library that its config names, if any.

        Raises:
            ValueError: if the library is damaged, was made for another base model, or the model has stacks already.
        """
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
        self._library = path  # last, so that an interrupted call does not leave the library recorded as attached

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors of a folder as `StackTuner` does.

        Raises:
            ValueError: also if the config names a library and there are tensors, or that library is not attached.
        """
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
        if self.resident is not None:
            # A new stack gets the place after all that the banks hold, so the whole library must be in memory.
            self._switch_to(self._selection(None))

    def _settle_if_free(self) -> None:
        """Do nothing with a library: this could read stacks from disk that no forward will need."""
        if self.resident is None:
            self._settle()

    def _take_out(self, name: str) -> None:
        if self.resident is not None:
            self.resident.forget(name)
        super()._take_out(name)

    # Which stacks answer

    @property
    def mode(self) -> str:
        """Which stacks are on as long as no caller has chosen any:

        - "auto": `generate` routes every prompt if the library has a router; a plain forward uses all stacks.
        - "routed": `generate` and plain forwards route.
        - "ungated": both use all stacks.
        - "base": both use none.

        After `use_stacks` the mode is "chosen". The environment variable BRAINSTACKS_MODE sets the mode of a library that is
        loaded; the default is "auto".

        Raises:
            ValueError: when set to anything else.
        """
        return self.selection.wanted.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode (or BRAINSTACKS_MODE) is {mode!r}; it must be one of {', '.join(MODES)}")
        with self.lock:
            self.selection.wanted = self._selection([] if mode == "base" else None, mode=mode)
            self._settle_if_free()
