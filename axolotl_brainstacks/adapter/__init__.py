"""The Brainstacks adapter as a PEFT tuner. It needs Transformers and PEFT, but not Axolotl."""

# PEFT comes first: its import registers the type BRAINSTACKS, and the registration imports modules of this folder.
import peft  # noqa: F401

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.tuner import StackTuner

__all__ = ["BrainstacksConfig", "BrainstacksLinear", "StackTuner"]
