"""Answers from a library: which stacks are in memory, which of them a prompt is answered with."""
