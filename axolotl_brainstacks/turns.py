"""The dataset type `axolotl_brainstacks.turns`, which makes a chat of two turns from the columns of an example.

    datasets:
      - path: tatsu-lab/alpaca
        type: axolotl_brainstacks.turns
        field_human: "{instruction}\n\n{input}"
        field_model: "{output}"

The model's chat template then formats the two turns, as it does with `type: chat_template`. All domains thus have one prompt
format, and `axolotl inference` uses the same one.
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
    """Python's format strings with columns as fields: `{question}`, `{options[A]}`, `{contexts[0]}`; None becomes ""."""

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if key not in kwargs:
            raise ValueError(f"The examples have no column `{key}`; they have {', '.join(kwargs)}")
        return kwargs[str(key)]

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else str(super().format_field(value, format_spec))


class TurnsStrategy(DatasetWrappingStrategy):
    """Makes `messages` from each example, and passes them to Axolotl's chat template strategy."""

    def __init__(self, chat: PromptTokenizingStrategy, formats: Mapping[str, str]) -> None:
        self.chat, self.formats = chat, dict(formats)

    def messages(self, row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
        """The two turns of an example, without the blank lines that an empty column leaves at their ends."""
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
            desc="Making turns from columns",
        )
        return wrap_dataset_for_tokenized_prompt(
            self.chat, chats, process_count=process_count, keep_in_memory=keep_in_memory
        )


def load(tokenizer: Any, cfg: Any, ds_cfg: Mapping[str, Any]) -> TurnsStrategy:
    """Make the strategy of a dataset; Axolotl calls this for `type: axolotl_brainstacks.turns`.

    Raises:
        ValueError: if the dataset lacks `field_human` or `field_model`, or the top level lacks `chat_template`, which
            `axolotl inference` needs to format its prompts in the same way.
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
