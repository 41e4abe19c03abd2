"""Answering with a library: which stacks are in memory, and which of them each prompt uses."""

# PEFT comes first: its import registers the type BRAINSTACKS, and the registration imports modules of this folder.
import peft  # noqa: F401
