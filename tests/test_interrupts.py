"""After an exception, at whatever point of loading, selecting or answering: the right answer, or an error."""

import copy
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.answering import DOMAINS, VOCABULARY, random_router, some_prompts
from support.interrupts import ERRORS, interrupted, points_of
from support.routed import new_library, tiny_base, tuner_of
from support.wrapped import freeze, llama, logits, tokens, wrap
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from axolotl_brainstacks.library import Library

SHORT: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": VOCABULARY, "pad_token_id": 0}


SEED = 15  # of a router that gives the prompts three routes, of three domains at most


def small_base() -> LlamaForCausalLM:
    torch.manual_seed(11)
    model = tiny_base()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def library_of(base: LlamaForCausalLM, folder: Path) -> Library:
    torch.manual_seed(12)
    made = new_library(folder / "library", base, DOMAINS)
    random_router(DOMAINS, seed=SEED).save(made)
    return made


def questions() -> list[Tensor]:
    torch.manual_seed(13)
    return [prompt[None] for prompt in some_prompts(3, 8)]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_base()


@pytest.fixture(scope="module")
def library(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return library_of(base, tmp_path_factory.mktemp("interrupts"))


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    return questions()


def loaded(base: LlamaForCausalLM, library: Library) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(library.path)).eval()


@torch.no_grad()
def answers(model: PeftModel, prompts: list[Tensor]) -> list[Tensor]:
    """By every domain's stacks, by the router's, by all at once, and what the base says."""
    found = [model.generate(prompts[0], domains={name: 1.0}, **SHORT) for name in DOMAINS]
    found += [model.generate(prompt, **SHORT) for prompt in prompts[:2]]
    found.append(model.generate(torch.cat(prompts), domains=[{"chat": 1.0, "code": 0.3}, {}, {"math": 0.5}], **SHORT))
    resident = tuner_of(model).resident
    assert resident is not None
    limit, resident.max_bytes = resident.max_bytes, None
    found.append(model(prompts[0]).logits)
    resident.max_bytes = limit
    return [*found, model.generate(prompts[0], domains={}, **SHORT)]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))


def calls(model: PeftModel, prompts: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """What is interrupted. None of it leaves anything on."""
    tuner = tuner_of(model)

    def held() -> None:
        with torch.no_grad(), tuner.routed(domains={"code": 1.0, "medical": 0.5}):
            model(prompts[1])
            with tuner.using_stacks(["s001_chat"]), tuner.disable_adapter():
                model(prompts[0])

    def switched() -> None:
        tuner.mode = "base"
        tuner.mode = "auto"

    def forward() -> None:
        tuner.mode = "routed"
        with torch.no_grad():
            model(prompts[2])
        tuner.mode = "auto"

    return {
        "named": lambda: [
            model.generate(prompts[0], domains={name: 1.0}, **SHORT) for name in ("math", "code", "chat")
        ],
        "not neighbours": lambda: model.generate(prompts[0], domains={"chat": 0.5, "math": 1.0}, **SHORT),
        "routed": lambda: [model.generate(prompt, **SHORT) for prompt in prompts[1:]],
        "route": lambda: tuner.route(prompts[0]),
        "held": held,
        "mode": switched,
        "forward": forward,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "tries"), [(False, 100), (True, 30)], ids=["", "offloaded"])
def test_an_interrupted_answer_leaves_no_trace(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor], offload: bool, tries: int
) -> None:
    """Stacks are read, evicted and switched by each, so most interrupts come in the middle of that."""
    rng, model = Random(21 + offload), loaded(base, library)
    tuner = tuner_of(model)
    if offload:
        tuner.offload_frozen()
    expected = answers(model, prompts)
    resident = tuner.resident
    assert resident is not None
    resident.max_bytes = resident.bytes // len(DOMAINS) * 3
    points = {}
    for name, call in calls(model, prompts).items():
        answers(model, prompts)
        points[name] = points_of(call)
    came = 0
    for number in range(tries):
        name = rng.choice(list(points))
        point, error = rng.randint(1, points[name]), rng.choice(ERRORS)
        came += interrupted(point, error, calls(model, prompts)[name])
        if name in ("mode", "forward"):  # the caller's own choice may stay: the interrupt came before it was taken back
            assert tuner.mode in ("auto", "base", "routed")
            tuner.mode = "auto"
        assert tuner.mode == "auto", f"{number}: {error.__name__} at point {point} of {name}"
        assert same(answers(model, prompts), expected), f"{number}: {error.__name__} at point {point} of {name}"
    assert came > 0.8 * tries
    assert free(tuner.lock)


def free(lock: Any) -> bool:
    """Whether another thread gets the lock."""
    got: list[bool] = []

    def take() -> None:
        got.append(lock.acquire(timeout=1))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]


def test_an_interrupted_first_answer_leaves_no_trace(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor]
) -> None:
    rng, expected = Random(31), answers(loaded(base, library), prompts)

    def first(model: PeftModel) -> Callable[[], Any]:
        return lambda: tuner_of(model).use_stacks(None)

    points = points_of(first(loaded(base, library)))
    came = 0
    for _ in range(20):
        model, point, error = loaded(base, library), rng.randint(1, points), rng.choice(ERRORS)
        came += interrupted(point, error, first(model))
        tuner_of(model).mode = "auto"
        assert same(answers(model, prompts), expected), f"{error.__name__} at point {point}"
    assert came > 15


def test_an_interrupted_load_is_right_or_an_error_when_it_is_tried_again(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor]
) -> None:
    """On the same base model, which may be half wrapped."""
    rng, expected = Random(41), answers(loaded(base, library), prompts)

    def load(into: LlamaForCausalLM) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that the base is wrapped a second time
            return PeftModel.from_pretrained(into, str(library.path)).eval()

    points, right = points_of(lambda: load(copy.deepcopy(base))), 0
    for _ in range(40):
        used, point = copy.deepcopy(base), rng.randint(1, points)
        interrupted(point, rng.choice(ERRORS), lambda used=used: load(used))
        for _ in range(2):
            try:
                again = load(used)
            except ValueError as error:
                assert "load the base model" in str(error), error
            else:
                assert same(answers(again, prompts), expected), f"point {point}"
                right += 1
                break
    assert 0 < right < 40


def test_an_adapter_added_by_an_interrupted_load_is_never_silently_the_base(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor]
) -> None:
    rng, expected = Random(51), answers(loaded(base, library), prompts)

    def wrapped() -> PeftModel:
        return wrap(copy.deepcopy(base), target_modules=["q_proj"]).eval()

    def load(model: PeftModel) -> None:
        model.load_adapter(str(library.path), "library")

    points = points_of(lambda: load(wrapped()))
    for _ in range(40):
        model, point = wrapped(), rng.randint(1, points)
        interrupted(point, KeyboardInterrupt, lambda model=model: load(model))
        try:
            load(model)
        except (ValueError, KeyError, RuntimeError):
            continue
        assert same(answers(model, prompts), expected), f"point {point}"


@pytest.mark.slow
def test_real_signals_at_any_time(base: LlamaForCausalLM, library: Library, prompts: list[Tensor]) -> None:
    """Also in the middle of a matrix product, whose end they wait for."""
    rng, model = Random(61), loaded(base, library)
    tuner, expected = tuner_of(model), answers(model, prompts)
    assert tuner.resident is not None
    tuner.resident.max_bytes = tuner.resident.bytes // len(DOMAINS) * 3
    came = 0
    for _ in range(40):
        name = rng.choice(["named", "routed", "held", "not neighbours"])
        call, start = calls(model, prompts)[name], time.perf_counter()
        call()
        with alarm(rng.random() * (time.perf_counter() - start)):
            try:
                call()
            except KeyboardInterrupt:
                came += 1
        assert tuner.mode == "auto" and same(answers(model, prompts), expected), name
    assert came > 10


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_cache_that_an_interrupt_left_half_filled_is_read_again(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor]
) -> None:
    rng, model = Random(71), loaded(base, library)
    first = model.generate(prompts[0], domains={"math": 1.0}, **SHORT)
    turn = torch.cat([first, prompts[1]], 1)
    expected = model.generate(turn, domains={"math": 1.0}, **SHORT)

    def chat(cache: DynamicCache) -> Callable[[], Any]:
        return lambda: model.generate(prompts[0], domains={"math": 1.0}, past_key_values=cache, **SHORT)

    points = points_of(chat(DynamicCache(config=model.config)))
    for _ in range(30):
        cache = DynamicCache(config=model.config)
        interrupted(rng.randint(1, points), KeyboardInterrupt, chat(cache))
        assert torch.equal(model.generate(turn, domains={"math": 1.0}, past_key_values=cache, **SHORT), expected)


def test_stacks_without_a_library_survive_interrupts_too() -> None:
    torch.manual_seed(81)
    rng, ids = Random(81), tokens()
    model = wrap(llama())
    tuner = tuner_of(model)
    stacks = freeze(model, ["s001_chat", "s002_code", "s003_math"])
    config = model.peft_config["default"]
    extra = {key: torch.randn_like(tensor) * 0.1 for key, tensor in stacks["s001_chat"].items()}

    def look() -> list[Tensor]:
        found = [logits(model, ids)]
        for names in (["s001_chat", "s003_math"], ["s002_code"], []):
            with tuner.using_stacks(names):
                found.append(logits(model, ids))
        return found

    expected = look()
    tuner.attach_stack("s004_law", "law", config, extra)  # type: ignore[arg-type]
    with_extra = look()[0]
    tuner.detach_stack("s004_law")

    def attach_and_detach() -> None:
        tuner.attach_stack("s004_law", "law", config, extra)  # type: ignore[arg-type]
        tuner.detach_stack("s004_law")

    def select() -> None:
        with tuner.using_stacks(["s001_chat", "s003_math"], torch.tensor([[0.5, 1.0]])):
            tuner.use_stacks(["s002_code"])
        with tuner.disable_adapter():
            pass

    points = {call: points_of(call) for call in (attach_and_detach, select)}
    for _ in range(100):
        call = rng.choice(list(points))
        point = rng.randint(1, points[call])
        interrupted(point, rng.choice(ERRORS), call)
        if "s004_law" in [stack.name for stack in tuner.stacks]:
            assert torch.equal(logits(model, ids), with_extra), f"point {point} of {call.__name__}"
            tuner.detach_stack("s004_law")
        assert same(look(), expected), f"point {point} of {call.__name__}"


def test_an_error_in_an_answer_reaches_the_page_and_not_the_next_answer(
    base: LlamaForCausalLM, library: Library, prompts: list[Tensor], tmp_path: Path
) -> None:
    class Page:
        def __init__(self) -> None:
            self.text, self.ended = "", False

        def put(self, _: Tensor) -> None:
            raise KeyboardInterrupt

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text, self.ended = self.text + text, stream_end

    model = loaded(base, library)
    expected = answers(model, prompts)
    tuner_of(model).show_routes, page = True, Page()
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompts[0], streamer=page, **SHORT)
    assert page.ended and page.text.endswith("Error: KeyboardInterrupt")
    assert tuner_of(model).mode == "auto" and same(answers(model, prompts), expected)
