"""Where the router's prompts come from: rows that no domain was trained on."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.models import base_config, chat_dataset
from support.processes import finish, start_train
from support.routed import new_library, random_rows
from test_routing_command import DOMAINS, SETTINGS, assert_refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_brainstacks.evaluation import Example, pack_rows, unpack_rows
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router_training.data import FOLDER

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def words(count: int, rng: Random) -> list[str]:
    """Different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(ALPHABET, k=7))] = None
    return list(found)


def dataset(path: Path, asked: list[str], answer: str) -> dict[str, Any]:
    """A file of chat rows, one for each word."""
    with path.open("w") as file:
        for word in asked:
            turns = [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{answer} {word}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return chat_dataset(path) | {"split": "train"}


def library_of(model: Path, folder: Path) -> Library:
    return new_library(folder / "library", AutoModelForCausalLM.from_pretrained(model), DOMAINS)


def prompts(library: Library, source: str) -> list[Example]:
    return unpack_rows((library.path / FOLDER / f"{source}.safetensors").read_bytes())


def asked(library: Library, source: str, model: Path) -> list[str]:
    """The words that the prompts of `source` ask for."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.decode(row.prompt_ids) for row in prompts(library, source)]
    return sorted(text.partition("Say ")[2].partition("<")[0] for text in texts)


def test_no_trained_prompt_is_among_the_routers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The whole command. `chat` has rows of its own for the router, `code` its validation data, `math` is not in the YAML;
    into each of them, and the mixed ones, slipped prompts that `chat` or `code` was trained on."""
    rng = Random(21)
    library = library_of(tiny_llama_dir, tmp_path)
    free = words(70, rng)
    trained = {"chat": free[:12], "code": free[12:24]}
    for_router, validation, mixed = free[24:36], free[36:50], free[50:58]
    slipped = [*trained["chat"][:2], *trained["code"][:3]]
    block = {
        "library": str(library.path),
        "router": SETTINGS | {"mixed_datasets": [dataset(tmp_path / "mixed.jsonl", mixed + slipped, "Both")]},
        "domains": [
            {
                "name": "chat",
                "datasets": [dataset(tmp_path / "chat.jsonl", trained["chat"], "Chat")],
                "test_datasets": [dataset(tmp_path / "chat-test.jsonl", free[58:60], "Chat")],
                "brainstacks": {
                    "router_datasets": [dataset(tmp_path / "chat-router.jsonl", for_router + slipped, "Other")]
                },
            },
            {
                "name": "code",
                "datasets": [dataset(tmp_path / "code.jsonl", trained["code"], "Code")],
                "test_datasets": [dataset(tmp_path / "code-test.jsonl", validation + slipped, "Code")],
            },
        ],
    }
    config = base_config(tiny_llama_dir, tmp_path / "out", adapter="brainstacks", brainstacks=block)
    # A prompt of chat's, as the library keeps those of a domain whose YAML is another one.
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama_dir)
    turns = [{"role": "user", "content": f"Say {trained['chat'][5]}"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    kept = random_rows(9, rng)
    with library.writing():
        leaked = Example([*prompt, 5, 6], [-100] * len(prompt) + [5, 6])
        library.write_file(f"{FOLDER}/math.safetensors", pack_rows([*kept, leaked]))

    log = finish([start_train(config, tmp_path, "router")], tmp_path)
    assert asked(library, "chat", tiny_llama_dir) == sorted(for_router), "all of them, and no validation row"
    assert asked(library, "code", tiny_llama_dir) == sorted(validation)
    assert asked(library, "_mixed", tiny_llama_dir) == sorted(mixed)
    assert prompts(library, "math") == kept
    for source, dropped, of in (("chat", 5, 17), ("code", 5, 19), ("_mixed", 5, 13), ("math", 1, 10)):
        assert f"{dropped} of {of} held-out rows of `{source}` left out" in log
    counts = json.loads((library.path / "router/evaluation.json").read_text())["prompts"]
    assert {source: sum(parts.values()) for source, parts in counts.items()} == {
        "chat": 12, "code": 14, "math": 9, "_mixed": 8
    }  # fmt: skip
    assert all(count > 0 for parts in counts.values() for count in parts.values())
    assert "The validation rows of `code` are not those that it was trained beside" in log
    assert "The validation rows of `chat` are not" not in log, "it has rows of its own"


def one_domain(model: Path, folder: Path, library: Library, trained: list[str], held_out: list[str]) -> dict[str, Any]:
    block = {"library": str(library.path), "domain": "code", "router": SETTINGS}
    return base_config(model, folder / "out", adapter="brainstacks", brainstacks=block) | {
        "datasets": [dataset(folder / "train.jsonl", trained, "Code")],
        # Axolotl takes a file of the same name for the same data.
        "test_datasets": [dataset(folder / f"{'-'.join(held_out)}.jsonl", held_out, "Code")],
    }


def test_too_few_held_out_prompts(tiny_llama_dir: Path, tmp_path: Path) -> None:
    library, some = library_of(tiny_llama_dir, tmp_path), words(12, Random(22))
    config = one_domain(tiny_llama_dir, tmp_path, library, some[:9], some[8:11])
    assert_refused(
        config, tmp_path, "`code` has 2 different held-out prompts.*router_datasets.*val_set_size.*test_datasets"
    )
    config = one_domain(tiny_llama_dir, tmp_path, library, some[:9], some[5:9])
    assert_refused(config, tmp_path, "All 4 held-out prompts of `code`.*router_datasets.*val_set_size.*test_datasets")


def test_rows_that_an_earlier_version_kept_are_not_used(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """They were training rows."""
    library, some = library_of(tiny_llama_dir, tmp_path), words(20, Random(23))
    with library.writing():
        library.write_file("router/discovery/math.safetensors", pack_rows(random_rows(8, Random(24))))
    config = one_domain(tiny_llama_dir, tmp_path, library, some[:10], some[10:])
    finish([start_train(config, tmp_path, "router")], tmp_path)
    assert prompts(library, "math") == unpack_rows(library.validation("math"))


@pytest.mark.parametrize("part", ["router_datasets", "mixed_datasets"])
def test_all_rows_of_a_named_file_are_used(tiny_llama_dir: Path, tmp_path: Path, part: str) -> None:
    """None of them is held back for a validation that nobody makes."""
    library, some = library_of(tiny_llama_dir, tmp_path), words(40, Random(25))
    named = [dataset(tmp_path / "named.jsonl", some[20:], "Named")]
    domain = {
        "name": "code",
        "datasets": [dataset(tmp_path / "train.jsonl", some[:10], "Code")],
        "test_datasets": [dataset(tmp_path / "test.jsonl", some[10:20], "Code")],
    }
    router = SETTINGS | ({part: named} if part == "mixed_datasets" else {})
    if part == "router_datasets":
        domain["brainstacks"] = {part: named}
    block = {"library": str(library.path), "domains": [domain], "router": router}
    config = base_config(tiny_llama_dir, tmp_path / "out", adapter="brainstacks", brainstacks=block)
    finish([start_train(config, tmp_path, "router")], tmp_path)
    source = "_mixed" if part == "mixed_datasets" else "code"
    assert asked(library, source, tiny_llama_dir) == sorted(some[20:])
