"""Threads that answer with one model at once: each with the stacks that it chose."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.answering import DOMAINS, VOCABULARY, own_stacks, random_router, some_prompts
from support.routed import new_library, tiny_base, tuner_of
from torch import Tensor
from transformers import LlamaForCausalLM

from axolotl_brainstacks.adapter.selection import ModelLock
from axolotl_brainstacks.library import Library

SHORT: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": VOCABULARY, "pad_token_id": 0}
# A router that asks for three domains at most for each of the prompts below.
SEED = 5


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return tiny_base()


@pytest.fixture(scope="module")
def library(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Library:
    torch.manual_seed(2)
    made = new_library(tmp_path_factory.mktemp("threads") / "library", base, DOMAINS)
    random_router(DOMAINS, seed=SEED).save(made)
    return made


@pytest.fixture
def model(base: LlamaForCausalLM, library: Library) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(library.path)).eval()


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    torch.manual_seed(3)
    return [prompt[None] for prompt in some_prompts(3, 8)]


def ways_to_ask(model: PeftModel, library: Library, prompts: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Short answers of every kind that no more than three domains' stacks are needed for."""
    tuner = tuner_of(model)

    def in_block(names: list[str]) -> Tensor:
        with torch.no_grad(), tuner.using_stacks(names):
            return model(prompts[0]).logits

    def routed(prompt: Tensor) -> Tensor:
        with torch.no_grad(), tuner.routed(prompt):
            return model(prompt).logits

    def mixed() -> Tensor:
        rows = [{"chat": 1.0}, {}, {"code": 0.5, "math": 1.0}]
        return model.generate(torch.cat(prompts), domains=rows, **SHORT)

    def generated_in_block() -> Tensor:
        with tuner.routed(domains={"medical": 1.0}):
            return model.generate(prompts[1], **SHORT)

    def mode() -> Tensor:
        tuner.mode = "auto"
        return torch.zeros(1)

    def route(prompt: Tensor) -> Tensor:
        (found,) = tuner.route(prompt)
        return torch.tensor([found.weights.get(domain, 0.0) for domain in DOMAINS])

    asks: dict[str, Callable[[], Tensor]] = {"mixed": mixed, "generated in block": generated_in_block, "mode": mode}
    for name in DOMAINS:
        asks[f"named {name}"] = lambda name=name: model.generate(prompts[0], domains={name: 1.0}, **SHORT)
        asks[f"block {name}"] = lambda name=name: in_block(own_stacks(library, name))
    for number, prompt in enumerate(prompts):
        asks[f"generated {number}"] = lambda prompt=prompt: model.generate(prompt, **SHORT)
        asks[f"routed {number}"] = lambda prompt=prompt: routed(prompt)
        asks[f"route {number}"] = lambda prompt=prompt: route(prompt)
    return asks


@pytest.mark.parametrize("limited", [False, True], ids=["", "limited memory"])
def test_eight_threads_get_what_one_gets(
    model: PeftModel, library: Library, prompts: list[Tensor], limited: bool
) -> None:
    """500 answers in all; with limited memory stacks come and go all the time, else plain forwards with all are mixed in."""
    asks, rng = ways_to_ask(model, library, prompts), Random(7 + limited)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(prompts[2]).logits

    everything = plain()
    resident = tuner_of(model).resident
    assert resident is not None
    if limited:
        resident.max_bytes = resident.bytes // len(DOMAINS) * 3
    else:
        asks["plain"] = plain
    expected = {name: ask() for name, ask in asks.items()}
    assert limited or torch.equal(expected["plain"], everything)
    assert len({tuple(expected[f"route {number}"].tolist()) for number in range(len(prompts))}) == 3
    wanted = [rng.choice(list(asks)) for _ in range(250)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: asks[name](), wanted))
    wrong = [name for name, answer in zip(wanted, found, strict=True) if not torch.equal(answer, expected[name])]
    assert not wrong
    assert tuner_of(model).mode == "auto"


def test_a_forward_waits_until_another_threads_block_ends(
    model: PeftModel, prompts: list[Tensor], base: LlamaForCausalLM
) -> None:
    tuner = tuner_of(model)
    with torch.no_grad():
        expected = model(prompts[0]).logits
    done: Future[Tensor] = Future()

    def forward() -> None:
        with torch.no_grad():
            done.set_result(model(prompts[0]).logits)

    thread = threading.Thread(target=forward)
    with torch.no_grad(), tuner.using_stacks([]):
        thread.start()
        thread.join(0.5)
        assert not done.done()
        assert torch.equal(model(prompts[0]).logits, base(prompts[0]).logits)
    thread.join(20)
    assert torch.equal(done.result(0), expected)


class Asks:
    """A streamer that has another thread do something in the middle of an answer."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask, self.came = ask, False

    def put(self, _: Tensor) -> None:
        thread = threading.Thread(target=self.ask, daemon=True)
        thread.start()
        thread.join(20)
        self.came = not thread.is_alive()

    def end(self) -> None:
        pass


def test_models_do_not_wait_for_each_other(
    model: PeftModel, base: LlamaForCausalLM, library: Library, prompts: list[Tensor]
) -> None:
    other = PeftModel.from_pretrained(copy.deepcopy(base), str(library.path)).eval()
    asks = Asks(lambda: other.generate(prompts[1], domains={"code": 1.0}, **SHORT))
    model.generate(prompts[0], domains={"chat": 1.0}, streamer=asks, **SHORT | {"max_new_tokens": 1})
    assert asks.came


def test_a_copy_has_a_lock_of_its_own(model: PeftModel, prompts: list[Tensor]) -> None:
    expected = model.generate(prompts[0], domains={"math": 1.0}, **SHORT)
    answer: list[Tensor] = []
    with tuner_of(model).using_stacks(["s001_chat"]):
        twin = copy.deepcopy(model)
        assert tuner_of(twin).lock is not tuner_of(model).lock
        thread = threading.Thread(
            target=lambda: answer.append(twin.generate(prompts[0], domains={"math": 1.0}, **SHORT)), daemon=True
        )
        thread.start()
        thread.join(20)
    assert torch.equal(answer[0], expected)


def test_a_lock_that_is_held_is_free_after_pickling() -> None:
    lock = ModelLock()
    with lock:
        other = pickle.loads(pickle.dumps(lock))
    assert isinstance(other, ModelLock) and not other._is_owned() and other is not lock
