"""A library on disk: one folder with frozen stacks, null-space columns, validation examples and a router, which one
manifest lists."""

from axolotl_brainstacks.library.entries import DomainEntry, RoundRecord, RouterEntry, StackEntry
from axolotl_brainstacks.library.library import Library
from axolotl_brainstacks.library.manifest import Manifest

__all__ = ["DomainEntry", "Library", "Manifest", "RoundRecord", "RouterEntry", "StackEntry"]
