"""The dataset type ``axolotl_brainstacks.question_answer``, which turns questions into prompts for GRPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SOURCES = ("messages", "prompt", "question", "system")


def question_answer(
    cfg: Any, dataset_idx: int = 0, **_: Any
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    """Make the transform for ``type: axolotl_brainstacks.question_answer``, an entry of ``datasets:``.

    An example has its question in the field ``prompt`` or ``question``, a text or a list of messages, with an optional text
    ``system``; or in ``messages``, whose last assistant turn is the reference answer. The reference is not part of the prompt;
    it becomes the field ``answer`` if there is none. The prompt becomes a list of messages, so that TRL applies the chat
    template. All other fields stay as columns for the reward functions.

    Returns:
        The function that transforms one example, and the keyword arguments for ``Dataset.map``. The function raises ValueError
        for an example without a question.
    """

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        conversation = row.get("messages")
        asked = row.get("prompt") or row.get("question") or conversation
        if not asked:
            raise ValueError(
                "`type: axolotl_brainstacks.question_answer` of `datasets:`: an example has none of the fields `prompt`, "
                f"`question` and `messages`, only {', '.join(f'`{key}`' for key in row)}: rename the one that asks"
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
    """The messages with role and content only.

    A dataset gives all of its examples the same keys, so a message may have a key of another example, with the value None.
    """
    return [{"role": message["role"], "content": message["content"]} for message in messages]
