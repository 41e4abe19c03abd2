"""What a loaded library has in memory: the stacks that its routes need, read once, within a limit."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.answering import DOMAINS, GREEDY, own_stacks, some_prompts
from support.answering import base as base
from support.answering import library as library
from support.answering import load as load
from support.answering import model as model
from support.routed import add_domain, new_library, tuner_of
from support.seeds import seeded_random
from transformers import AutoTokenizer, LlamaForCausalLM, TextIteratorStreamer

from axolotl_brainstacks.library import Library


def test_only_what_a_route_needs_is_read_and_only_once(model: PeftModel, library: Library) -> None:
    resident, ids = tuner_of(model).resident, torch.stack(some_prompts(1, 8))
    assert resident is not None
    assert resident.bytes == resident.bytes_read == 0
    model.generate(ids, domains={}, **GREEDY)
    assert resident.bytes_read == 0
    model.generate(ids, domains={"math": 1.0}, **GREEDY)
    files = [library.manifest.stack(name).files["adapter_model.safetensors"] for name in own_stacks(library, "math")]
    assert resident.bytes_read == sum(file.bytes for file in files)
    assert sorted(resident.names) == own_stacks(library, "math")
    assert resident.bytes == sum(
        b.nbytes for layer in tuner_of(model).brainstacks_layers() for b in layer.bank.buffers()
    )
    before = resident.bytes_read
    model.generate(torch.stack(some_prompts(1, 9)), domains={"math": 0.3}, **GREEDY)
    assert resident.bytes_read == before
    for prompt in some_prompts(5):
        model.generate(prompt[None], **GREEDY)
        before = resident.bytes_read
        model.generate(prompt[None], **GREEDY)
        assert resident.bytes_read == before


def test_the_least_recently_used_stacks_leave_under_a_limit(model: PeftModel, library: Library) -> None:
    tuner, ids = tuner_of(model), torch.stack(some_prompts(1, 8))
    resident = tuner.resident
    assert resident is not None
    expected = {name: model.generate(ids, domains={name: 1.0}, **GREEDY) for name in DOMAINS}
    together = model.generate(ids, domains={"chat": 1.0, "math": 1.0}, **GREEDY)
    one = resident.bytes // len(DOMAINS)
    resident.max_bytes = 2 * one
    for use, left in (("chat", {"chat", "math"}), ("code", {"chat", "code"}), ("chat", {"chat", "code"}),
                      ("medical", {"chat", "medical"})):  # fmt: skip
        assert torch.equal(model.generate(ids, domains={use: 1.0}, **GREEDY), expected[use])
        assert sorted(resident.names) == own_stacks(library, *left)
        assert (
            resident.bytes
            == 2 * one
            == sum(b.nbytes for layer in tuner.brainstacks_layers() for b in layer.bank.buffers())
        )
    assert torch.equal(model.generate(ids, domains={"math": 1.0, "chat": 1.0}, **GREEDY), together)
    with pytest.raises(ValueError, match=f"max_resident_bytes is {2 * one}.*take {3 * one}"):
        model.generate(ids, domains={"math": 1.0, "chat": 1.0, "code": 1.0}, **GREEDY)
    with pytest.raises(ValueError, match="max_resident_bytes"):
        model(ids)
    assert resident.bytes == 2 * one


def test_stacks_read_in_inference_mode_serve_outside_of_it_too(model: PeftModel) -> None:
    tuner, ids = tuner_of(model), torch.stack(some_prompts(1, 8))
    with torch.inference_mode():
        expected = model.generate(ids, domains={"math": 1.0, "code": 1.0}, **GREEDY)
        model.generate(ids, domains={"chat": 1.0, "code": 1.0}, **GREEDY)  # not neighbours
    assert tuner.resident is not None
    tuner.resident.max_bytes = tuner.resident.bytes // 3 * 2
    model.generate(ids, domains={"medical": 1.0}, **GREEDY)
    assert torch.equal(model.generate(ids, domains={"math": 1.0, "code": 1.0}, **GREEDY), expected)
    model.enable_input_require_grads()
    with tuner.routed(domains={"math": 1.0}):
        model(ids, labels=ids).loss.backward()


def test_an_offloaded_library_answers_the_same_and_is_read_as_often(
    model: PeftModel, load: Callable[..., PeftModel], library: Library
) -> None:
    offloaded = load(library.path)
    tuner_of(offloaded).offload_frozen()
    for domains in ({"math": 1.0}, {"chat": 0.5, "code": 1.0}, {}, {"math": 1.0}):
        ids = torch.stack(some_prompts(2, 8))
        answers = [each.generate(ids, domains=domains, **GREEDY) for each in (model, offloaded)]
        assert torch.equal(*answers)
    read = [tuner_of(each).resident for each in (model, offloaded)]
    assert read[0] is not None and read[1] is not None
    assert read[0].bytes_read == read[1].bytes_read and read[0].names == read[1].names


def test_memory_does_not_grow_with_the_domains_on_disk(
    base: LlamaForCausalLM, load: Callable[..., PeftModel], tmp_path: Path
) -> None:
    library = new_library(tmp_path / "library", base, ["chat", "code", "math"])
    ids, peaks, read = torch.stack(some_prompts(1, 8)), [], []
    for count in (3, 30):
        for number in range(len(library.manifest.domains), count):
            add_domain(library, base, f"domain{number}")
        model = load(library.path)
        for domain in ("math", "chat", "math"):
            model.generate(ids, domains={domain: 1.0}, **GREEDY)
        resident = tuner_of(model).resident
        assert resident is not None
        buffers = sum(b.nbytes for layer in tuner_of(model).brainstacks_layers() for b in layer.bank.buffers())
        assert resident.peak_bytes == resident.bytes == buffers
        peaks.append(resident.peak_bytes)
        read.append(resident.bytes_read)
    assert len(library.manifest.stacks) == 30
    assert peaks[0] == peaks[1] and read[0] == read[1]


def test_the_order_in_which_stacks_came_leaves_no_trace(
    base: LlamaForCausalLM, load: Callable[..., PeftModel], tmp_path: Path
) -> None:
    """To the last bit, also when stacks of other shapes lie between."""
    library = new_library(tmp_path / "library", base, ["a", "b"])
    add_domain(library, base, "c", settings={"r": 4, "num_experts": 2})
    add_domain(library, base, "d")
    add_domain(library, base, "e", settings={"r": 4, "num_experts": 2})
    everything = load(library.path)
    ids = torch.stack(some_prompts(3, 8))
    with torch.no_grad():
        everything(ids)
        rng = seeded_random()
        for _ in range(12):
            names = rng.sample(["a", "b", "c", "d", "e"], rng.randint(1, 4))
            piecemeal = load(library.path)
            for name in rng.sample(names, len(names)):
                with tuner_of(piecemeal).routed(domains={name: 1.0}):
                    piecemeal(ids[:1])
            weights = {name: rng.random() for name in names}
            logits = []
            for model in (everything, piecemeal):
                with tuner_of(model).routed(domains=weights):
                    logits.append(model(ids).logits)
            assert torch.equal(*logits)


def test_a_damaged_stack_is_named_when_it_is_needed(
    library: Library, load: Callable[..., PeftModel], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    broken = Library.open(shutil.copytree(library.path, tmp_path / "library"))
    file = broken.stack_path(own_stacks(broken, "math")[0]) / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model, ids = load(broken.path), torch.stack(some_prompts(1, 8))
    expected = model.generate(ids, domains={"chat": 1.0}, **GREEDY)
    with pytest.raises(ValueError, match=f"{file.parent.name}.*altered"):
        model.generate(ids, domains={"math": 1.0}, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, domains={"chat": 1.0}, **GREEDY), expected)
    tuner_of(model).show_routes = True
    streamer = TextIteratorStreamer(AutoTokenizer.from_pretrained(tiny_llama_dir), timeout=10)
    with pytest.raises(ValueError, match="altered"):
        model.generate(ids, domains={"math": 1.0}, streamer=streamer, **GREEDY)
    assert re.fullmatch(r"\[math 1\.00\]\nError: .* is altered .*", "".join(streamer)), (
        "a page is told, and waits no more"
    )
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load(broken.path)
