import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routed import add_domain, meter_of, new_library, random_rows, tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from axolotl_brainstacks.args import RouterArgs
from axolotl_brainstacks.evaluation import IGNORED, Row
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.routing.discovery import Found, discover, row_key
from axolotl_brainstacks.routing.measure import Meter
from axolotl_brainstacks.routing.search import DomainSet

FIVE = ["chat", "code", "math", "medical", "reasoning"]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_base()


def run(library: Library, meter: Meter, rows: list[Row], **settings: Any) -> list[Found]:
    with library.writing():
        return discover(library, meter, {"chat": rows}, RouterArgs(**settings))["chat"]


def records(library: Library) -> bytes:
    return (library.path / "router/discovery/chat.jsonl").read_bytes()


@torch.no_grad()
def published_loop(meter: Meter, row: Row, min_gain: float) -> tuple[dict[DomainSet, float], DomainSet, int]:
    """The paper's procedure on one row, a forward per set: losses, best set, forwards."""
    losses: dict[DomainSet, float] = {}

    def loss_of(names: DomainSet) -> float:
        stacks = [stack.name for stack in meter.stacks if stack.domain in names]
        with meter.tuner.using_stacks(stacks), meter.model.disable_adapter():
            logits = meter.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        losses[names] = float(F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED))
        return losses[names]

    loss, best = loss_of(()), ()
    while len(best) < len(meter.domains):
        grown = {tuple(d for d in meter.domains if d in (*best, new)) for new in meter.domains if new not in best}
        trial = {names: loss_of(names) for names in grown}
        choice = min(trial, key=lambda names: trial[names])
        if not loss - trial[choice] > min_gain:
            break
        loss, best = trial[choice], choice
    return losses, best, len(losses)


def assert_as_published(meter: Meter, found: list[Found]) -> int:
    """The loop must measure the same sets, find the same losses and choose the same set; returns its forwards.

    Rounding differs between a row alone and a row in a batch. A token that stands on the edge between two experts may
    then take the other one, which moves its row's loss by more than rounding: few rows may, and they are left out.
    """
    forwards, moved = 0, 0
    for item in found:
        losses, best, needed = published_loop(meter, item.row, min_gain=0.01)
        forwards += needed
        if any(abs(item.losses[names] - losses[names]) > 1e-4 for names in losses.keys() & item.losses.keys()):
            moved += 1
            continue
        assert item.best == best
        assert set(item.losses) == set(losses), "something was measured that nobody reads, or not measured"
    assert moved <= len(found) // 8, f"{moved} of {len(found)} rows have other losses"
    return forwards


def test_batched_discovery_finds_what_the_published_loop_finds(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE, stacks=2)
    meter = meter_of(library, base, batch_size=8)
    found = run(library, meter, random_rows(24, Random()))
    counted = meter.forwards
    needed = assert_as_published(meter, found)
    assert counted * 5 <= needed, f"{counted} forwards, the published loop needs {needed}"
    assert len({item.best for item in found}) > 3, "the rows are too much alike to prove anything"


def test_the_same_on_a_pretrained_model(smollm2_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    rows = []
    for question, answer in (
        ("The capital of France is", " Paris."),
        ("1 + 2 =", " 3, and 2 + 3 = 5."),
        ("Hi!", " Hello"),
    ):
        prompt, reply = tokenizer(question)["input_ids"], tokenizer(answer)["input_ids"]
        rows.append(Row(prompt + reply, [IGNORED] * len(prompt) + reply))
    library = new_library(tmp_path / "library", base, FIVE[:2], scale=0.03)
    meter = meter_of(library, base)
    found = run(library, meter, rows)
    assert len({round(loss, 3) for item in found for loss in item.losses.values()}) > 6, "the stacks do nothing"
    assert_as_published(meter, found)


def test_exhaustive_measures_every_set(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:3])
    meter = meter_of(library, base)
    rows = random_rows(12, Random())
    grown = run(library, meter, rows)
    after_greedy = meter.forwards
    best = run(library, meter, rows, search="exhaustive")
    assert meter.forwards - after_greedy < after_greedy, "greedy's losses were measured again"
    every = {subset for size in range(4) for subset in combinations(FIVE[:3], size)}
    for one, other in zip(best, grown, strict=True):
        assert set(one.losses) == every
        cost = {names: loss + 0.01 * len(names) for names, loss in one.losses.items()}
        assert cost[one.best] == min(cost.values()) <= cost[other.best]


def test_records_tell_every_loss_and_a_second_run_measures_nothing(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:3])
    rows = random_rows(9, Random())
    found = run(library, meter_of(library, base), rows)
    lines = [json.loads(line) for line in records(library).splitlines()]
    assert lines[0] == {"stacks": {name: [f"s00{i}_{name}"] for i, name in enumerate(FIVE[:3], start=1)}}
    by_key = {line["row"]: line for line in lines[1:]}
    for item in found:
        line = by_key[row_key(item.row)]
        assert line["losses"] == {"+".join(names): loss for names, loss in item.losses.items()}
        assert line["best"] == list(item.best)
    before, again = records(library), meter_of(library, base)
    assert run(library, again, rows) == found
    assert again.forwards == 0 and records(library) == before


def test_two_libraries_of_the_same_stacks_get_the_same_records(base: LlamaForCausalLM, tmp_path: Path) -> None:
    rows, seed = random_rows(20, Random()), Random().randrange(10**6)
    texts = []
    for name in ("one", "two"):
        torch.manual_seed(seed)
        library = new_library(tmp_path / name, base, FIVE[:3])
        run(library, meter_of(library, base, batch_size=4), rows)
        texts.append(records(library))
    assert texts[0] == texts[1]


def test_a_new_domain_measures_only_sets_that_contain_it(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows = random_rows(16, Random())
    first = run(library, meter_of(library, base), rows, search="exhaustive")
    add_domain(library, base, "math")
    library = Library.open(library.path)
    meter = meter_of(library, base, batch_size=8)
    second = run(library, meter, rows, search="exhaustive")
    assert meter.forwards == 16 * 4 / 8, "four new sets a row, in batches of eight"
    for old, new in zip(first, second, strict=True):
        assert {names: loss for names, loss in new.losses.items() if "math" not in names} == old.losses


def test_a_domain_trained_anew_is_measured_anew(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows = random_rows(6, Random())
    first = run(library, meter_of(library, base), rows, search="exhaustive")
    with library.writing():
        library.remove_domain("code")
    add_domain(library, base, "code")
    second = run(library, meter_of(library, base), rows, search="exhaustive")
    for old, new in zip(first, second, strict=True):
        assert new.losses[()] == old.losses[()] and new.losses["chat",] == old.losses["chat",]
        assert new.losses["code",] != old.losses["code",] and new.losses["chat", "code"] != old.losses["chat", "code"]


def test_damaged_records_are_named(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows, meter = random_rows(3, Random()), meter_of(library, base)
    run(library, meter, rows)
    path = library.path / "router/discovery/chat.jsonl"
    path.write_bytes(records(library)[:-20])
    with pytest.raises(ValueError, match=r"chat\.jsonl is damaged"):
        run(library, meter, rows)


class Doomed(Meter):
    """Kills its own process at the given forward."""

    at = 0

    def _batch_losses(self, *args: Any) -> list[float]:
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._batch_losses(*args)


def in_fork(action: Callable[[], object]) -> int | None:
    """Run `action` in a forked process; its exit status."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_killed_run_resumes_to_the_same_records(base: LlamaForCausalLM, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = new_library(tmp_path / "whole", base, FIVE[:3])
    folder = shutil.copytree(whole.path, tmp_path / "killed")
    rows, meter = random_rows(32, Random()), meter_of(whole, base, batch_size=1)
    run(whole, meter, rows)
    doomed = Doomed(meter.model, meter.tuner, meter.domains, meter.stacks, 1)
    doomed.at = Random().randrange(meter.forwards // 2, meter.forwards)
    assert in_fork(lambda: run(Library.open(folder), doomed, rows)) == -signal.SIGKILL
    killed = Library.open(folder)
    assert 1 < len(records(killed).splitlines()) < 33, "the kill came too early or too late to prove anything"
    resumed = meter_of(killed, base, batch_size=1)
    run(killed, resumed, rows)
    assert records(killed) == records(whole)
    assert 0 < resumed.forwards < meter.forwards
