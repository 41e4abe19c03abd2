"""Helpers of the rewards: the text of a completion, the values of a column, and the places where a final answer begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Completion = str | list[dict[str, Any]]

_MARKER = re.compile(r"####|\\boxed\s*\{|\banswers?\b[*_\s]{0,4}(?:is\b|are\b|:|=)", re.IGNORECASE)


def text_of(completion: Completion) -> str:
    """The text of a completion; of a list of messages, that of the last assistant message; "" if there is none."""
    if isinstance(completion, str):
        return completion
    answers = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = answers[-1].get("content") if answers else None
    if isinstance(content, list):  # a list of parts, as in the messages of vision models
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def column(columns: Mapping[str, Any], name: str, reward: str) -> list[Any]:
    """The values of the column `name`. Raises ValueError, naming the function `reward`, if the data lack the column."""
    if name in columns:
        return list(columns[name])
    there = ", ".join(f"`{key}`" for key, values in columns.items() if isinstance(values, list)) or "none"
    raise ValueError(
        f"the reward function `{reward}` needs the column `{name}`, but besides the prompt the examples of `datasets:` have "
        f"{there}: add the field `{name}` to the data, or take `{reward}` out of `trl.reward_funcs`"
    )


def marked_answers(text: str) -> Iterator[str]:
    r"""Yield the rest of `text` after each ``####``, ``\boxed{``, "answer is" or "answer:", beginning with the last one.

    Only the last four markers count, because the time would otherwise grow with the square of the number of markers.
    """
    for marker in reversed(list(_MARKER.finditer(text))[-4:]):
        yield text[marker.end() :]
