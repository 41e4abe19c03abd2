"""Brainstacks for Axolotl."""
