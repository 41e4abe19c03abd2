"""Registers the adapter type ``BRAINSTACKS`` with PEFT."""

from collections.abc import Callable
from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "BRAINSTACKS"
PREFIX = "brainstacks_"


class _TunerOnUse:
    """Stands in PEFT's table for the tuner class, which is imported when PEFT first calls it or reads an attribute.

    Whoever trains a plain LoRA imports PEFT too, and needs no library and no router for that.
    """

    prefix = PREFIX

    def __init__(self, load: Callable[[], type]) -> None:
        self._load = load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


def register_peft_type(load_tuner: Callable[[], type]) -> None:
    """Add ``PeftType.BRAINSTACKS``, and register our config and tuner for it. A second call does nothing.

    Args:
        load_tuner: imports and returns the tuner class.
    """
    if NAME not in PeftType.__members__:
        _add_member()
        # This module uses the new member, so it is imported after it exists.
        from axolotl_brainstacks.adapter.config import BrainstacksConfig

        tuner = _TunerOnUse(load_tuner)
        register_peft_method(name=NAME.lower(), prefix=PREFIX, config_cls=BrainstacksConfig, model_cls=tuner)


def _add_member() -> None:
    """Add a member to PEFT's enum. Neither `enum` nor PEFT has a public way to do that, so this does what `EnumType` does."""
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
