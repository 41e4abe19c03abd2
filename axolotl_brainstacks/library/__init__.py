"""The library on disk: frozen stacks, null spaces, validation rows and a router in one folder, under one manifest."""

from axolotl_brainstacks.library.library import Library
from axolotl_brainstacks.library.manifest import DomainEntry, Manifest, RoundRecord, RouterEntry, StackEntry

__all__ = ["DomainEntry", "Library", "Manifest", "RoundRecord", "RouterEntry", "StackEntry"]
