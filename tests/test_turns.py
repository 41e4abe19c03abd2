"""`type: axolotl_brainstacks.turns`: columns to turns, through the same chat template as chats."""

from pathlib import Path
from typing import Any

import pytest
from axolotl.prompt_strategies import chat_template
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoTokenizer

TYPE = "axolotl_brainstacks.turns"
ROW: dict[str, Any] = {
    "question": "Which?",
    "options": {"A": "this", "B": "that"},
    "context": {"contexts": ["First.", "Second."]},
    "note": None,
    "answer": "that",
}


def prepared(folder: Path, human: str | None, model: str | None, **cfg: Any) -> tuple[Dataset, Any]:
    """The row as Axolotl prepares it, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = DictDefault({"path": "some/rows", "type": TYPE, "field_human": human, "field_model": model})
    settings = DictDefault({"sequence_len": 256, "train_on_inputs": False, "chat_template": "tokenizer_default", **cfg})
    rows, _ = get_dataset_wrapper(dataset, tokenizer, settings, TYPE, Dataset.from_list([ROW]))
    return rows, tokenizer


@pytest.mark.parametrize(
    ("human", "question"),
    [
        ("{question}", "Which?"),
        ("{question}\n\nA. {options[A]}\nB. {options[B]}", "Which?\n\nA. this\nB. that"),
        ("{context[contexts][1]} {question}", "Second. Which?"),
        ("{question}\n\n{note}", "Which?"),
    ],
    ids=["column", "options", "list", "empty column"],
)
def test_columns_become_the_turns_of_a_chat(human: str, question: str, tiny_llama_dir: Path) -> None:
    rows, tokenizer = prepared(tiny_llama_dir, human, "B. {answer}")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "B. that"}]
    cfg = DictDefault({"sequence_len": 256, "chat_template": "tokenizer_default"})
    expected = chat_template.load(tokenizer, cfg, {}).tokenize_prompt({"messages": turns})
    assert [list(row["input_ids"]) for row in rows] == [expected["input_ids"]]
    assert [list(row["labels"]) for row in rows] == [expected["labels"]]
    assert tokenizer.decode([label for label in rows[0]["labels"] if label >= 0]) == "B. that<|im_end|>"


@pytest.mark.parametrize(
    ("human", "model", "cfg", "said"),
    [
        ("{quesiton}", "{answer}", {}, ["quesiton", "question, options"]),
        (None, "{answer}", {}, ["`field_human`", "some/rows", "{question}"]),
        ("{question}", None, {}, ["`field_model`", "some/rows"]),
        ("{question}", "{answer}", {"chat_template": None}, ["`chat_template`", "chat_template: tokenizer_default"]),
    ],
    ids=["column", "field_human", "field_model", "chat_template"],
)
def test_mistakes_name_the_key_and_the_mend(
    human: str | None, model: str | None, cfg: dict[str, Any], said: list[str], tiny_llama_dir: Path
) -> None:
    with pytest.raises(ValueError) as error:
        prepared(tiny_llama_dir, human, model, **cfg)
    assert all(part in str(error.value) for part in said), error.value
