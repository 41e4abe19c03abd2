"""Routed answers of a loaded library: each row its own stacks."""

import copy
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support.answering import DOMAINS, GREEDY, own_stacks, random_router, some_prompts
from support.answering import base as base
from support.answering import library as library
from support.answering import load as load
from support.answering import model as model
from support.models import base_config, chat_dataset
from support.routed import add_domain, new_library, tuner_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM, TextStreamer

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.serving.model import BrainstacksModel


def padded_left(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.cat([torch.zeros(length - len(p), dtype=torch.long), p]) for p in prompts])
    return ids, (ids != 0).long()


def different_routes(model: PeftModel, count: int) -> list[Tensor]:
    """`count` random prompts of at least three different routes."""
    prompts = some_prompts(200)
    routes = model.base_model.route(*padded_left(prompts))
    by_route: dict[tuple[str, ...], list[Tensor]] = {}
    for prompt, route in zip(prompts, routes, strict=True):
        by_route.setdefault(tuple(sorted(route.weights)), []).append(prompt)
    assert len(by_route) >= 3
    turns = [group[turn] for turn in range(count) for group in by_route.values() if turn < len(group)]
    return turns[:count]


# Routes


def test_a_mixed_batch_answers_as_single_calls_do(model: PeftModel) -> None:
    prompts = different_routes(model, 8)
    ids, mask = padded_left(prompts)
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(input_ids=prompt[None], **GREEDY)[0, len(prompt) :]
        assert torch.equal(row, alone)
    model.base_model.mode = "ungated"
    assert not torch.equal(together, model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :])


def test_the_answer_is_that_of_the_routes_stacks_and_weights(model: PeftModel, library: Library) -> None:
    """Against a decoding loop without a cache, with the stacks switched on by hand."""
    tuner = tuner_of(model)
    for prompt in different_routes(model, 4):
        (route,) = tuner.route(prompt[None])
        stacks = [stack for stack in library.manifest.stacks if stack.domain in route.weights]
        weights = torch.tensor([[route.weights[stack.domain] for stack in stacks]])
        tokens = prompt[None]
        with torch.no_grad(), tuner.using_stacks([stack.name for stack in stacks], weights):
            for _ in range(12):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(prompt[None], **GREEDY), tokens)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_keep_their_rows_route(model: PeftModel, how: dict[str, Any]) -> None:
    model.double()  # or rounding, which padding changes, decides between beams of nearly the same probability
    prompts = different_routes(model, 3)
    ids, mask = padded_left(prompts)
    each = how.get("num_return_sequences", 1)
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **how)[:, ids.shape[1] :]
    assert len(together) == 3 * each
    for number, prompt in enumerate(prompts):
        alone = model.generate(input_ids=prompt[None], **GREEDY, **how)[:, len(prompt) :]
        assert torch.equal(together[number * each : (number + 1) * each], alone)


def test_sampled_sequences_of_a_row_keep_its_route(model: PeftModel) -> None:
    ids, mask = padded_left(different_routes(model, 3))
    torch.manual_seed(3)
    out = model.generate(
        input_ids=ids, attention_mask=mask, **GREEDY | {"do_sample": True, "top_k": 1}, num_return_sequences=2
    )
    greedy = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(out, greedy.repeat_interleave(2, 0))


def test_padding_without_a_mask_is_found_as_generate_finds_it(model: PeftModel) -> None:
    ids, mask = padded_left([*some_prompts(1, 4), *some_prompts(1, 9)])
    expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(inputs=ids, **GREEDY), expected)


def test_a_streamed_answer_is_the_same_and_shows_its_route_when_asked(model: PeftModel, tiny_llama_dir: Path) -> None:
    (prompt,) = some_prompts(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    expected = model.generate(prompt[None], **GREEDY)
    for show in (False, True):
        tuner_of(model).show_routes = show
        with redirect_stdout(io.StringIO()) as printed:
            streamed = model.generate(prompt[None], streamer=TextStreamer(tokenizer), **GREEDY)
        assert torch.equal(streamed, expected)
        assert (f"[{tuner_of(model).route(prompt[None])[0]}]" in printed.getvalue()) is show
        assert tokenizer.decode(streamed[0])[-5:] in printed.getvalue()


def test_text_prompts_route_as_their_tokens_do(model: PeftModel) -> None:
    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) - 31 for letter in text]}

    texts = ["a chat", "2 + 2 = ?", "def f(x):"]
    single = [tuner_of(model).route(torch.tensor([Tokenizer()(text)["input_ids"]]))[0] for text in texts]
    for one, other in zip(tuner_of(model).route(texts, tokenizer=Tokenizer()), single, strict=True):
        assert one.weights.keys() == other.weights.keys() and one.uncovered == other.uncovered
        assert list(one.weights.values()) == pytest.approx(list(other.weights.values()), abs=1e-5)
    assert tuner_of(model).route(texts[0], tokenizer=Tokenizer()) == single[:1]
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        tuner_of(model).route([texts[0], ""], tokenizer=Tokenizer())


def test_a_prompt_that_no_domain_claims_is_uncovered(model: PeftModel) -> None:
    tuner = tuner_of(model)
    tuner.router = random_router(DOMAINS, floors={"chat": 0.25})
    with torch.no_grad():
        tuner.router.network.outputs.bias.fill_(-1000)
    (route,) = tuner.route(some_prompts(1)[0][None])
    assert route.uncovered and route.weights == {"chat": 0.25}
    assert str(route) == "chat 0.25 (uncovered)"


# Overrides


def test_no_domains_is_the_base_bit_for_bit(model: PeftModel, base: LlamaForCausalLM) -> None:
    ids, mask = padded_left(some_prompts(4))
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    mine = model.generate(input_ids=ids, attention_mask=mask, domains={}, **how)
    plain = base.generate(input_ids=ids, attention_mask=mask, **how)
    assert torch.equal(mine.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, plain.logits, strict=True))


def test_named_domains_override_the_router(model: PeftModel, library: Library) -> None:
    ids = torch.stack(some_prompts(3, 8))
    with tuner_of(model).using_stacks(own_stacks(library, "math", "chat")):
        expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, domains={"math": 1.0, "chat": 1.0}, **GREEDY), expected)
    with tuner_of(model).routed(domains={"math": 1.0, "chat": 1.0}):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    mixed = model.generate(ids, domains=[{"math": 1.0, "chat": 1.0}, {}, {"code": 0.5}], **GREEDY)
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(mixed[1], model.generate(ids[1:2], domains={}, **GREEDY)[0])
    assert torch.equal(mixed[2], model.generate(ids[2:], domains={"code": 0.5}, **GREEDY)[0])


def test_mistakes_of_a_call_are_named(model: PeftModel) -> None:
    ids = torch.stack(some_prompts(3, 8))
    with pytest.raises(ValueError, match=r"`legal`.*chat, code, math, medical"):
        model.generate(ids, domains={"legal": 1.0})
    for weight in (float("nan"), float("-inf"), "1"):
        with pytest.raises(ValueError, match=rf"`domains` gives `chat` the weight {weight!r}"):
            model.generate(ids, domains={"chat": weight})
    for domains in ("chat", ["chat"] * 3):
        with pytest.raises(ValueError, match=r"`domains` is .*'chat'.* must be a mapping"):
            model.generate(ids, domains=domains)
    with pytest.raises(ValueError, match="2 mappings for 3 prompts"):
        model.generate(ids, domains=[{}, {}])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        tuner_of(model).route(ids, torch.tensor([[1], [0], [1]]).expand_as(ids))
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        model.generate(ids[:, :0], **GREEDY)
    with pytest.raises(ValueError, match="give `tokenizer=`"):
        tuner_of(model).route(["2 + 2"])
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.randn(1, 4, 32), **GREEDY)
    with pytest.raises(ValueError, match=r"'fast'.*auto, routed, ungated, base"):
        tuner_of(model).mode = "fast"


def test_a_router_that_does_not_fit_the_library_is_refused(
    base: LlamaForCausalLM, load: Callable[..., PeftModel], tmp_path: Path
) -> None:
    library = new_library(tmp_path / "library", base, ["chat", "code"])
    prompt = some_prompts(1)[0][None]
    model = load(library.path)
    with pytest.warns(UserWarning, match="has no router"):
        answer = model.generate(prompt, **GREEDY)
    tuner_of(model).mode = "ungated"
    assert torch.equal(model.generate(prompt, **GREEDY), answer)
    tuner_of(model).mode = "routed"
    with pytest.raises(ValueError, match="has no router"):
        model.generate(prompt, **GREEDY)
    random_router(["chat", "code"]).save(library)
    assert tuner_of(model).route(prompt)
    model = load(library.path)
    add_domain(library, base, "math")
    with pytest.raises(ValueError, match="load it again"):
        model.generate(prompt, **GREEDY)
    with pytest.raises(ValueError, match="knows chat, code, but the library has chat, code, math"):
        load(library.path).generate(prompt, **GREEDY)
    with library.writing():
        library.remove_domain("math")
    with pytest.raises(ValueError, match="stale"):
        load(library.path).generate(prompt, **GREEDY)


# Modes


def test_a_plain_forward_has_all_stacks_on_unless_a_mode_says_otherwise(
    model: PeftModel, base: LlamaForCausalLM, library: Library
) -> None:
    ids, tuner = torch.stack(different_routes(model, 1)), tuner_of(model)
    with torch.no_grad():
        everything = model(ids).logits
        with tuner.using_stacks(own_stacks(library, *DOMAINS)):
            assert torch.equal(model(ids).logits, everything)
        assert torch.equal(model.get_base_model()(ids).logits, everything)
        tuner.mode = "base"
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model.generate(ids, **GREEDY), base.generate(ids, **GREEDY))
        tuner.mode = "routed"
        routed = model(ids).logits
        with tuner.using_stacks([]):
            assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids).logits, routed)
        with tuner.routed(ids):
            assert torch.equal(model(ids).logits, routed)
        tuner.mode = "ungated"
        assert torch.equal(model(ids).logits, everything)
        assert not torch.equal(routed, everything)


def test_a_routed_forward_reads_the_prompt_before_the_labels(model: PeftModel) -> None:
    prompts, tuner = different_routes(model, 4), tuner_of(model)
    rows = [torch.cat([prompt, *some_prompts(1, 30 - len(prompt))]) for prompt in prompts]
    labels = [torch.cat([torch.full_like(p, -100), row[len(p) :]]) for p, row in zip(prompts, rows, strict=True)]
    tuner.mode = "routed"
    with torch.no_grad():
        got = model(torch.stack(rows), labels=torch.stack(labels)).logits
        for logits, prompt, row in zip(got, prompts, rows, strict=True):
            with tuner.routed(prompt[None]):
                torch.testing.assert_close(model(row[None]).logits[0], logits, rtol=1e-4, atol=1e-4)
        cache = DynamicCache(config=model.config)
        model(torch.stack(rows), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="KV cache"):
            model(torch.ones(4, 1, dtype=torch.long), past_key_values=cache)


def test_the_environment_says_how_a_library_starts(
    load: Callable[..., PeftModel], base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINSTACKS_MODE", "base")
    ids = torch.stack(some_prompts(2, 7))
    assert torch.equal(load()(ids).logits, base(ids).logits)
    monkeypatch.setenv("BRAINSTACKS_MODE", "gated")
    with pytest.raises(ValueError, match="BRAINSTACKS_MODE"):
        load()


def test_a_cache_that_was_filled_under_another_route_is_read_again(model: PeftModel) -> None:
    """A chat: the second turn's prompt begins with the first turn, and its route differs."""
    tuner = tuner_of(model)
    turns = []
    while len(turns) < 2:
        first, second = different_routes(model, 2)
        conversation = model.generate(first[None], **GREEDY)
        turns = [conversation, torch.cat([conversation, second[None]], 1)]
        if tuner.route(first[None])[0] == tuner.route(turns[1])[0]:
            turns = []
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(first[None], past_key_values=cache, **GREEDY), turns[0])
    with_cache = model.generate(turns[1], past_key_values=cache, **GREEDY)
    assert torch.equal(with_cache, model.generate(turns[1], **GREEDY))
    filled, same = cache.get_seq_length(), tuner.route(turns[1], turns[1].ne(GREEDY["pad_token_id"]).long())[0].weights
    seen: list[int] = []
    hook = (
        model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    )
    model.generate(with_cache, past_key_values=cache, domains=same, **GREEDY)
    hook.remove()
    assert seen[0] == with_cache.shape[1] - filled


@pytest.mark.parametrize("between", ["base", "ungated", "chosen", "interrupted"])
def test_a_cache_is_read_again_whichever_way_the_stacks_changed(model: PeftModel, between: str) -> None:
    """One cache for a domain's answer, an answer without routing, and the domain's again."""
    tuner, cache = tuner_of(model), DynamicCache(config=model.config)
    of_chat = {"domains": {"chat": 1.0}}

    def both(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        cached = model.generate(ids, past_key_values=cache, **options, **GREEDY)
        assert torch.equal(cached, model.generate(ids, **options, **GREEDY))
        return torch.cat([cached, some_prompts(1, 5)[0][None]], 1)

    ids = some_prompts(1, 7)[0][None]
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)  # with all stacks on
    ids = both(torch.cat([ids, some_prompts(1, 3)[0][None]], 1), **of_chat)
    if between == "chosen":
        with tuner.using_stacks([stack.name for stack in tuner.stacks if stack.domain == "code"]):
            ids = both(ids)
        with tuner.using_stacks([stack.name for stack in tuner.stacks if stack.domain == "math"]):
            ids = both(ids)
    elif between == "interrupted":
        tuner.mode = "ungated"
        layer = model.get_base_model().model.layers[-1]
        with interrupted_at(layer, call=3), pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, **GREEDY)
        ids = both(ids)
    else:
        tuner.mode = between
        ids = both(ids)
    tuner.mode = "auto"
    both(ids, **of_chat)


@contextmanager
def interrupted_at(layer: torch.nn.Module, call: int) -> Iterator[None]:
    """Interrupt the given call of `layer`."""
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()


def test_a_copy_of_a_loaded_model_is_whole(model: PeftModel) -> None:
    ids = torch.stack(some_prompts(2, 7))
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(other.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_axolotl_inference_answers_routed_and_shows_the_route(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from axolotl.cli.inference import do_cli

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    library = new_library(tmp_path / "library", base, ["chat", "code"])
    random_router(["chat", "code"], floors={"chat": 0.125}, features=64).save(library)
    block = {
        "library": str(library.path), "max_resident_bytes": 10**6,
        "domains": [{"name": "chat", "datasets": [chat_dataset(tmp_path / "chat.jsonl")]}],
    }  # fmt: skip
    config = base_config(tiny_llama_dir, tmp_path / "out", adapter="brainstacks", brainstacks=block)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    answered: list[BrainstacksModel] = []
    generate = BrainstacksModel.generate

    def seen(tuner: BrainstacksModel, *args: Any, **kwargs: Any) -> Any:
        answered.append(tuner)
        return generate(tuner, *args, **kwargs)

    monkeypatch.setattr(BrainstacksModel, "generate", seen)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Reverse abc\n"))
    do_cli(str(tmp_path / "config.yml"))
    (tuner,) = answered
    turn = [{"role": "user", "content": "Reverse abc"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    batch = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    (route,) = tuner.route(batch["input_ids"])
    printed = capsys.readouterr().out
    assert f"[{route}]" in printed and "Reverse abc" in printed.split(f"[{route}]")[1]
    assert tuner.resident is not None and tuner.resident.max_bytes == 10**6
    assert {stack.domain for stack in tuner.stacks if stack.name in tuner.resident.names} == set(route.weights)
    add_domain(library, base, "math")
    with pytest.raises(ValueError, match="knows chat, code, but the library has chat, code, math"):
        do_cli(str(tmp_path / "config.yml"))
    for name in ("chat", "code", "math"):
        with library.writing():
            library.remove_domain(name)
    with pytest.raises(ValueError, match="has no stacks to answer with"):
        do_cli(str(tmp_path / "config.yml"))
    assert "Give me an instruction" not in capsys.readouterr().out, (
        "no one is asked for a prompt that cannot be answered"
    )
