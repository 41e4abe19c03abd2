"""Answers from a library: which stacks are in memory, which of them a prompt is answered with."""

# First of all: importing PEFT registers our type, and that imports the modules of this folder.
import peft  # noqa: F401
