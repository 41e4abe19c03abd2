"""Turns rows of questions into what GRPO trains on; the ``type:`` of an entry of ``datasets:``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SOURCES = ("messages", "prompt", "question", "system")


def question_answer(
    cfg: Any, dataset_idx: int = 0, **_: Any
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    """Axolotl's dataset transform ``type: axolotl_brainstacks.question_answer``.

    A row asks in its field ``prompt`` or ``question`` (a text, or a list of messages), with an optional text ``system``,
    or in ``messages``, whose last assistant turn is the reference: it is not part of the prompt, and is the ``answer`` of a
    row that has no such field. The prompt becomes a list of messages, so the chat template applies. All other fields stay,
    as columns for the reward functions.

    Returns the function of a row, and the keyword arguments of ``Dataset.map``. A row that asks nothing raises ValueError.
    """

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        conversation = row.get("messages")
        asked = row.get("prompt") or row.get("question") or conversation
        if not asked:
            raise ValueError(
                "`type: axolotl_brainstacks.question_answer` of `datasets:`: a row has none of the fields `prompt`, `question` "
                f"and `messages`, only {', '.join(f'`{key}`' for key in row)}: rename the one that asks"
            )
        kept = {key: value for key, value in row.items() if key not in _SOURCES}
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else _plain(asked)
        if asked is conversation and messages[-1]["role"] == "assistant":
            reference = messages.pop()["content"]
            if kept.get("answer") is None:
                kept["answer"] = reference
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
        return {"prompt": messages, **kept}

    return transform, {"remove_columns": list(_SOURCES)}


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Role and content alone: of two rows with different further keys, a data set gives both all of them, as None."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]
