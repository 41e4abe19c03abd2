"""What all rewards share: the text of a completion, the columns of its row, and where a final answer begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Completion = str | list[dict[str, Any]]

_MARKER = re.compile(r"####|\\boxed\s*\{|\banswers?\b[*_\s]{0,4}(?:is\b|are\b|:|=)", re.IGNORECASE)


def text_of(completion: Completion) -> str:
    """The text of a completion, or of the last assistant message of a conversational one; "" when it has none."""
    if isinstance(completion, str):
        return completion
    answers = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = answers[-1].get("content") if answers else None
    if isinstance(content, list):  # parts, as vision models have them
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def column(columns: Mapping[str, Any], name: str, reward: str) -> list[Any]:
    """The values of the column `name`. Raises ValueError when the data have none."""
    if name in columns:
        return list(columns[name])
    there = ", ".join(f"`{key}`" for key, values in columns.items() if isinstance(values, list)) or "none"
    raise ValueError(
        f"the reward function `{reward}` needs the column `{name}`, but besides the prompt the rows of `datasets:` have "
        f"{there}: add the field `{name}` to the data, or take `{reward}` out of `trl.reward_funcs`"
    )


def marked_answers(text: str) -> Iterator[str]:
    r"""What follows each ``####``, ``\boxed{``, "answer is" or "answer:" up to the end of `text`, the last one first.

    Only the last four count, so that a text full of markers is not read once for each.
    """
    for marker in reversed(list(_MARKER.finditer(text))[-4:]):
        yield text[marker.end() :]
