"""A reward for completions that match a regular expression."""

from __future__ import annotations

from typing import Any

import regex

from axolotl_brainstacks.rewards.text import Completion, text_of

ANSWER_AT_END = r"####[ \t]*\S[^\n]*\Z"
SECONDS = 0.5  # for one match. Some patterns take hours on some texts; `regex` can stop at a time limit, `re` cannot


def answer_format(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    """Return 1.0 if the regular expression in the column ``pattern`` matches somewhere in the completion, else 0.0.

    Without a pattern the completion has to end with ``#### <answer>``. A pattern for the whole completion needs ``^`` and
    ``$``; flags are written into the pattern, e.g. ``(?s)``. White space at both ends of the completion is removed first. A
    match that takes longer than `SECONDS` does not count.

    Args:
        prompts: not used.
        completions: the completions to score.
        columns: the data's columns, with one entry per completion.

    Returns:
        One reward per completion.

    Raises:
        ValueError: if a pattern is not a regular expression.
    """
    patterns = columns.get("pattern") or [None] * len(completions)
    rows = zip(completions, patterns, strict=True)
    return [float(_follows(text_of(completion).strip(), pattern or ANSWER_AT_END)) for completion, pattern in rows]


def _follows(text: str, pattern: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError:
        return False
    except (regex.error, TypeError) as error:
        raise ValueError(
            f"the column `pattern` holds {pattern!r}, which is no regular expression ({error}): correct it in the data"
        ) from None
