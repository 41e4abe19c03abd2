"""Answering with a library: which stacks are in memory, and which of them each prompt uses."""
