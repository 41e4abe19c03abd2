"""lm-eval scores a local task on a routed library, in its three modes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from support.routed import new_library, tuner_of
from support.seeds import seeded_random
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router_args import GateArgs
from axolotl_brainstacks.serving.lm_harness import BrainstacksLM

DOMAINS = ["chat", "math"]


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    made = new_library(
        tmp_path_factory.mktemp("harness") / "library", AutoModelForCausalLM.from_pretrained(tiny_llama_dir), DOMAINS
    )
    gate = GateArgs(gate_threshold=0.5)
    router = Router.fresh(RouterConfig(domains=DOMAINS, features=64, width=16, dropout=0.0, gate=gate), 4)
    with torch.no_grad():
        router.network.domain_queries.mul_(9)
        router.network.outputs.weight.mul_(40)
    router.save(made)
    return made


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskManager, list[dict[str, Any]]]:
    """Twelve questions with four choices of differing length."""
    folder, rng = tmp_path_factory.mktemp("task"), seeded_random()
    rows = [
        {
            "question": f"Reverse {''.join(rng.choices('abcdef', k=rng.randint(2, 9)))}:",
            "choices": ["".join(rng.choices("abcdef", k=rng.randint(2, 9))) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for _ in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "reversing", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "reversing.yaml").write_text(yaml.safe_dump(config))
    return TaskManager(include_path=str(folder), include_defaults=False), rows


def scores(lm: HFLM, manager: TaskManager) -> list[list[float]]:
    results = simple_evaluate(
        lm, tasks=["reversing"], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    assert 0 <= results["results"]["reversing"]["acc,none"] <= 1
    samples = sorted(results["samples"]["reversing"], key=lambda sample: sample["doc_id"])
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


def by_hand(rows: list[dict[str, Any]], tokenizer: Any, logits: Callable[[Tensor, int], Tensor]) -> list[list[float]]:
    """Summed log probabilities of each choice; `logits` of (1, tokens), told how many of them are the question's."""
    found = []
    for row in rows:
        question = tokenizer(row["question"])["input_ids"]
        found.append([])
        for choice in row["choices"]:
            tokens = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            log_probabilities = logits(tokens, len(question))[0, :-1].log_softmax(-1)
            picked = log_probabilities.gather(1, tokens[0, 1:, None])[len(question) - 1 :]
            found[-1].append(float(picked.sum()))
    return found


@torch.no_grad()
def test_scores_in_three_modes(
    tiny_llama_dir: Path, library: Library, task: tuple[TaskManager, list[dict[str, Any]]]
) -> None:
    manager, rows = task
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), str(library.path)).eval()
    tuner = tuner_of(model)

    def routed(tokens: Tensor, prompt: int) -> Tensor:
        with tuner.routed(tokens[:, :prompt]):
            return model(tokens).logits

    expected = {
        "base": by_hand(rows, tokenizer, lambda tokens, _: base(tokens).logits),
        "ungated": by_hand(rows, tokenizer, lambda tokens, _: model(tokens).logits),
        "routed": by_hand(rows, tokenizer, routed),
    }
    questions = [row["question"] for row in rows]
    assert len({tuple(route.weights) for route in tuner.route(questions, tokenizer=tokenizer)}) > 1
    for mode, wanted in expected.items():
        loaded = BrainstacksLM(
            pretrained=str(tiny_llama_dir), peft=str(library.path), mode=mode, device="cpu", batch_size=3
        )
        given = BrainstacksLM(pretrained=model, tokenizer=tokenizer, mode=mode, batch_size=2)
        for lm in (loaded, given):
            torch.testing.assert_close(torch.tensor(scores(lm, manager)), torch.tensor(wanted), rtol=1e-4, atol=1e-3)
    differences = torch.tensor(expected["routed"]) - torch.tensor(expected["ungated"])
    assert float(differences.abs().max()) > 0.1


def test_stock_hflm_takes_the_mode_that_the_model_has(
    tiny_llama_dir: Path, library: Library, task: tuple[TaskManager, list[dict[str, Any]]]
) -> None:
    """In mode routed a whole row, continuation included, is the prompt; it is not padded at batch size 1."""
    manager, rows = task
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), str(library.path)).eval()
    tuner = tuner_of(model)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    tuner.mode = "base"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    with torch.no_grad():
        expected = by_hand(rows, tokenizer, lambda tokens, _: base(tokens).logits)
    torch.testing.assert_close(torch.tensor(scores(lm, manager)), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    tuner.mode = "routed"

    def routed(tokens: Tensor, _: int) -> Tensor:
        with torch.no_grad(), tuner.routed(tokens[:, :-1]):
            return model(tokens).logits

    expected = by_hand(rows, tokenizer, routed)
    torch.testing.assert_close(torch.tensor(scores(lm, manager)), torch.tensor(expected), rtol=1e-4, atol=1e-3)
