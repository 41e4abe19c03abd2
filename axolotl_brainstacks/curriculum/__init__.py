"""Trains the domains of a curriculum one after another inside one `axolotl train` (paper section 1)."""
