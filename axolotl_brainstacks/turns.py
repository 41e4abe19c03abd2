"""A dataset type for rows that are no chats yet: `type: axolotl_brainstacks.turns` makes a chat of their columns.

    datasets:
      - path: tatsu-lab/alpaca
        type: axolotl_brainstacks.turns
        field_human: "{instruction}\n\n{input}"
        field_model: "{output}"

The two turns then go through the model's chat template, as `type: chat_template` data does. So all domains share one
prompt format, which is also the one that `axolotl inference` puts around an instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from axolotl.datasets import wrap_dataset_for_tokenized_prompt
from axolotl.prompt_strategies import chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy, PromptTokenizingStrategy
from datasets import Dataset

FIELDS = {"field_human": "user", "field_model": "assistant"}


class _Columns(Formatter):
    """Python's format strings over a row's columns: `{question}`, `{options[A]}`, `{contexts[0]}`."""

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if key not in kwargs:
            raise ValueError(f"The rows have no column `{key}`; they have {', '.join(kwargs)}")
        return kwargs[str(key)]

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else str(super().format_field(value, format_spec))


class TurnsStrategy(DatasetWrappingStrategy):
    """Makes `messages` of each row, and hands them to Axolotl's chat template strategy."""

    def __init__(self, chat: PromptTokenizingStrategy, formats: Mapping[str, str]) -> None:
        self.chat, self.formats = chat, dict(formats)

    def messages(self, row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
        """The row's two turns; an empty column leaves no blank lines at their ends."""
        columns = _Columns()
        return {
            "messages": [
                {"role": role, "content": columns.vformat(self.formats[key], (), row).strip()}
                for key, role in FIELDS.items()
            ]
        }

    def wrap_dataset(
        self, dataset: Dataset, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        chats = dataset.map(
            self.messages,
            remove_columns=dataset.column_names,
            num_proc=process_count,
            keep_in_memory=bool(keep_in_memory),
            desc="Making turns of columns",
        )
        return wrap_dataset_for_tokenized_prompt(
            self.chat, chats, process_count=process_count, keep_in_memory=keep_in_memory
        )


def load(tokenizer: Any, cfg: Any, ds_cfg: Mapping[str, Any]) -> TurnsStrategy:
    """What Axolotl calls for this `type:`.

    Raises:
        ValueError: if `field_human` or `field_model` is missing, or `chat_template` at the top level, without which
            `axolotl inference` would use none.
    """
    for key in FIELDS:
        if not ds_cfg.get(key):
            raise ValueError(
                f"`{key}` is missing in the dataset {ds_cfg.get('path')} of `type: {__name__}`; name its columns there, "
                'such as "{question}"'
            )
    if not cfg.get("chat_template"):
        raise ValueError(
            f"`chat_template` is missing, and the dataset {ds_cfg.get('path')} of `type: {__name__}` is written with it; "
            "set `chat_template: tokenizer_default` at the top level"
        )
    chat = chat_template.load(tokenizer, cfg, {**ds_cfg, "field_messages": "messages"})
    return TurnsStrategy(chat, {key: ds_cfg[key] for key in FIELDS})
