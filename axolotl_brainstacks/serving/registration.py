"""Teaches PEFT the type ``BRAINSTACKS``; PEFT has no public way for outside packages to add a member to its enum."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "BRAINSTACKS"


def register_peft_type() -> None:
    """Add ``PeftType.BRAINSTACKS`` and map it to our config and tuner. Does nothing when called again."""
    if NAME not in PeftType.__members__:
        _add_member()
        from axolotl_brainstacks.adapter.config import BrainstacksConfig
        from axolotl_brainstacks.serving.model import BrainstacksModel

        register_peft_method(
            name=NAME.lower(), prefix="brainstacks_", config_cls=BrainstacksConfig, model_cls=BrainstacksModel
        )


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
