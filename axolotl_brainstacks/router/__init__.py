"""Which domains answer a prompt: features of the base model, a small network, thresholds."""

# First of all: importing PEFT registers our type, and that imports the modules of this folder.
import peft  # noqa: F401
