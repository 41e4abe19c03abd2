"""Rewards a completion that has the asked form."""

from __future__ import annotations

from typing import Any

import regex

from axolotl_brainstacks.rewards.text import Completion, text_of

ANSWER_AT_END = r"####[ \t]*\S[^\n]*\Z"
SECONDS = 0.5  # for one match; patterns exist that take hours, which `re` cannot interrupt


def answer_format(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    """1.0 where the row's regular expression, the column ``pattern``, is found in the completion, else 0.0.

    Without one the completion must end with ``#### <answer>``. Anchor a pattern with ``^`` and ``$`` where all of the
    completion has to match; flags go into it, e.g. ``(?s)``. White space around the completion is dropped before. A match
    that takes longer than `SECONDS` counts as none.

    Raises ValueError when a pattern is no regular expression.
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
