"""Trains the domains of a curriculum one after another inside one `axolotl train` (arXiv 2604.01152, curriculum)."""
