"""The Brainstacks adapter as a PEFT tuner. Knows nothing of Axolotl: works with plain Transformers and PEFT."""

# First of all: importing PEFT registers our type, and that imports the modules of this folder.
import peft  # noqa: F401

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.tuner import StackTuner

__all__ = ["BrainstacksConfig", "BrainstacksLinear", "StackTuner"]
