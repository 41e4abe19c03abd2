"""Reward functions for tests of GRPO, named in `trl.reward_funcs`."""

from typing import Any


def letters(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Share of lower-case letters: easily raised by any policy."""
    texts = [completion[0]["content"] if isinstance(completion, list) else completion for completion in completions]
    return [sum(character.islower() for character in text) / max(len(text), 1) for text in texts]


def infinite_later(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """`letters`, until the third step; then infinity for the first completion."""
    rewards = letters(prompts, completions)
    if columns["trainer_state"].global_step >= 2:
        rewards[0] = float("inf")
    return rewards
