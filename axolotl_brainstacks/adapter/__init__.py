"""The Brainstacks adapter as a PEFT tuner. Knows nothing of Axolotl: works with plain Transformers and PEFT."""

# First of all: it registers our type, which imports the modules below; begun by one of them it would be a circle.
import peft  # noqa: F401

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.model import BrainstacksModel

__all__ = ["BrainstacksConfig", "BrainstacksLinear", "BrainstacksModel"]
