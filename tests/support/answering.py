"""What the tests of routed answers share: a library with a router, loaded around a tiny model, and prompts."""

import copy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router_args import GateArgs
from support.routed import VOCABULARY, new_library, tiny_base
from support.seeds import seeded_random

DOMAINS = ["chat", "code", "math", "medical"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": VOCABULARY, "pad_token_id": 0}


def random_router(
    domains: list[str],
    weights: str = "soft",
    floors: dict[str, float] | None = None,
    features: int = 32,
    seed: int | None = None,
) -> Router:
    """A router whose probabilities differ widely from prompt to prompt, so that routes do."""
    config = RouterConfig(
        domains=domains, features=features, width=16, dropout=0.0,
        gate=GateArgs(gate_threshold=0.5, weights=weights, floors=floors or {}),
    )  # fmt: skip
    rng = seeded_random() if seed is None else Random(seed)
    router = Router.fresh(config, seed=rng.randrange(2**30))
    with torch.no_grad():
        router.network.domain_queries.mul_(6)
        router.network.outputs.weight.mul_(30)
        router.network.outputs.bias.zero_()
    return router


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_base()


@pytest.fixture(scope="module")
def library(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Four domains of two stacks each, and a router."""
    made = new_library(tmp_path_factory.mktemp("inference") / "library", base, DOMAINS, stacks=2)
    random_router(DOMAINS).save(made)
    return made


@pytest.fixture
def load(base: LlamaForCausalLM, library: Library) -> Callable[..., PeftModel]:
    def load(path: Path = library.path) -> PeftModel:
        return PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()

    return load


@pytest.fixture
def model(load: Callable[..., PeftModel]) -> PeftModel:
    return load()


def some_prompts(count: int, length: int | None = None) -> list[Tensor]:
    """Random prompts without the padding token, of 3 to 20 tokens unless `length` says."""
    return [torch.randint(1, VOCABULARY, (length or seeded_random().randint(3, 20),)) for _ in range(count)]


def own_stacks(library: Library, *domains: str) -> list[str]:
    return [stack.name for stack in library.manifest.stacks if stack.domain in domains]
