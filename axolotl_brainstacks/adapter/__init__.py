"""The Brainstacks adapter as a PEFT tuner. Knows nothing of Axolotl: works with plain Transformers and PEFT."""

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLayer
from axolotl_brainstacks.adapter.model import BrainstacksModel

__all__ = ["BrainstacksConfig", "BrainstacksLayer", "BrainstacksModel"]
