"""Registers the adapter type ``BRAINSTACKS`` with PEFT."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "BRAINSTACKS"


def register_peft_type() -> None:
    """Add ``PeftType.BRAINSTACKS``, and register our config and tuner for it. A second call does nothing."""
    if NAME not in PeftType.__members__:
        _add_member()
        # These modules use the new member, so they are imported after it exists.
        from axolotl_brainstacks.adapter.config import BrainstacksConfig
        from axolotl_brainstacks.serving.model import BrainstacksModel

        register_peft_method(
            name=NAME.lower(), prefix="brainstacks_", config_cls=BrainstacksConfig, model_cls=BrainstacksModel
        )


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
