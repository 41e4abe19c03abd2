"""The router at run time: features of the base model, a small network, and thresholds decide which domains a prompt uses."""

# PEFT comes first: its import registers the type BRAINSTACKS, and the registration imports modules of this folder.
import peft  # noqa: F401
