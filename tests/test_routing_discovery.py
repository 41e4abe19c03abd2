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
from support.routed import add_domain, meter_of, new_library, random_rows, tiny_base
from support.seeds import seeded_random
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from axolotl_brainstacks.evaluation import IGNORED, Example
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.discovery import DiscoveryResult, discover, row_key
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.search import DomainSet

FIVE = ["chat", "code", "math", "medical", "reasoning"]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_base()


def run(library: Library, meter: LossMeter, rows: list[Example], **settings: Any) -> list[DiscoveryResult]:
    with library.writing():
        return discover(library, meter, {"chat": rows}, RouterArgs(**{"search": "greedy"} | settings))["chat"]


def records(library: Library) -> bytes:
    return (library.path / "router/discovery/chat.jsonl").read_bytes()


@torch.no_grad()
def loop(meter: LossMeter, row: Example, min_gain: float) -> tuple[dict[DomainSet, float], DomainSet, int]:
    """Greedy search both ways on one row, a forward per set: losses, best set, forwards."""
    losses: dict[DomainSet, float] = {}

    def loss_of(names: DomainSet) -> float:
        if names not in losses:
            stacks = [stack.name for stack in meter.stacks if stack.domain in names]
            with meter.tuner.using_stacks(stacks), meter.model.disable_adapter():
                logits = meter.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            losses[names] = float(F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED))
        return losses[names]

    grown, everything = (), tuple(meter.domains)
    while larger := [tuple(d for d in everything if d in (*grown, new)) for new in everything if new not in grown]:
        choice = min(larger, key=loss_of)
        if not loss_of(grown) - loss_of(choice) > min_gain:
            break
        grown = choice
    shrunk = everything
    while smaller := [tuple(d for d in shrunk if d != old) for old in shrunk]:
        choice = min(smaller, key=loss_of)
        if loss_of(choice) - loss_of(shrunk) > min_gain:
            break
        shrunk = choice
    return losses, min([grown, shrunk], key=lambda names: loss_of(names) + min_gain * len(names)), len(losses)


def assert_as_in_a_loop(meter: LossMeter, found: list[DiscoveryResult]) -> int:
    """The loop must measure the same sets, find the same losses and choose the same set; returns its forwards.

    Rounding differs between a row alone and a row in a batch. A token that stands on the edge between two experts may
    then take the other one, which moves its row's loss by more than rounding: few rows may, and they are left out.
    """
    forwards, moved = 0, 0
    for item in found:
        losses, best, needed = loop(meter, item.row, min_gain=0.01)
        forwards += needed
        if any(abs(item.losses[names] - losses[names]) > 1e-4 for names in losses.keys() & item.losses.keys()):
            moved += 1
            continue
        assert item.best == best
        assert set(item.losses) == set(losses), "something was measured that nobody reads, or not measured"
    assert moved <= len(found) // 8, f"{moved} of {len(found)} rows have other losses"
    return forwards


def test_batched_discovery_finds_what_a_loop_over_rows_and_sets_finds(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE, stacks=2)
    meter = meter_of(library, base, batch_size=8)
    found = run(library, meter, random_rows(24, seeded_random()))
    counted = meter.forwards
    needed = assert_as_in_a_loop(meter, found)
    assert counted * 5 <= needed, f"{counted} forwards, the loop needs {needed}"
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
        rows.append(Example(prompt + reply, [IGNORED] * len(prompt) + reply))
    library = new_library(tmp_path / "library", base, FIVE[:2], scale=0.03)
    meter = meter_of(library, base)
    found = run(library, meter, rows)
    assert len({round(loss, 3) for item in found for loss in item.losses.values()}) > 6, "the stacks do nothing"
    assert_as_in_a_loop(meter, found)


def test_exhaustive_measures_every_set(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:3])
    meter = meter_of(library, base)
    rows = random_rows(12, seeded_random())
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
    rows = random_rows(9, seeded_random())
    found = run(library, meter_of(library, base), rows)
    lines = [json.loads(line) for line in records(library).splitlines()]
    stacks = {name: [f"s00{i}_{name}"] for i, name in enumerate(FIVE[:3], start=1)}
    assert lines[0] == {"stacks": stacks, "floors": {}}
    by_key = {line["row"]: line for line in lines[1:]}
    for item in found:
        line = by_key[row_key(item.row)]
        assert line["losses"] == {"+".join(names): loss for names, loss in item.losses.items()}
        assert (line["best"], line["found_by"]) == (list(item.best), item.found_by)
        assert line["base"] == line["losses"][""] == item.base
    before, again = records(library), meter_of(library, base)
    assert run(library, again, rows) == found
    assert again.forwards == 0 and records(library) == before


def test_two_libraries_of_the_same_stacks_get_the_same_records(base: LlamaForCausalLM, tmp_path: Path) -> None:
    rows, seed = random_rows(20, seeded_random()), seeded_random().randrange(10**6)
    texts = []
    for name in ("one", "two"):
        torch.manual_seed(seed)
        library = new_library(tmp_path / name, base, FIVE[:3])
        run(library, meter_of(library, base, batch_size=4), rows)
        texts.append(records(library))
    assert texts[0] == texts[1]


def test_a_new_domain_measures_only_sets_that_contain_it(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows = random_rows(16, seeded_random())
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
    rows = random_rows(6, seeded_random())
    first = run(library, meter_of(library, base), rows, search="exhaustive")
    with library.writing():
        library.remove_domain("code")
    add_domain(library, base, "code")
    second = run(library, meter_of(library, base), rows, search="exhaustive")
    for old, new in zip(first, second, strict=True):
        assert new.losses[()] == old.losses[()] and new.losses["chat",] == old.losses["chat",]
        assert new.losses["code",] != old.losses["code",] and new.losses["chat", "code"] != old.losses["chat", "code"]


def test_floors_are_part_of_what_is_measured(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:3])
    rows, floors = random_rows(6, Random(2)), {"chat": 0.2, "math": 0.5}
    meter = meter_of(library, base)
    for item in run(library, meter, rows, search="exhaustive", floors=floors):
        assert len(item.losses) == 8
        for names, loss in [*item.losses.items(), (None, item.base)]:
            weights = {d: 1.0 if d in (names or ()) else floors.get(d, 0.0) for d in FIVE[:3]}
            assert loss == pytest.approx(weighted_loss(meter, item.row, {} if names is None else weights), abs=1e-4)
        assert item.base != item.losses[()], "no stack at all is not the same as floors alone"


@torch.no_grad()
def weighted_loss(meter: LossMeter, row: Example, weights: dict[str, float]) -> float:
    """The loss of one row alone, with every stack of a domain at that domain's weight."""
    stacks = [stack for stack in meter.stacks if weights.get(stack.domain)]
    factors = torch.tensor([[weights[stack.domain] for stack in stacks]])
    with meter.tuner.using_stacks([stack.name for stack in stacks], factors), meter.model.disable_adapter():
        logits = meter.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
    return float(F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED))


def test_other_floors_are_measured_anew_and_the_base_is_not(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows = random_rows(8, Random(4))

    def measured(**floors: float) -> tuple[int, list[DiscoveryResult]]:
        meter = meter_of(library, base, batch_size=8)
        found = run(library, meter, rows, search="exhaustive", floors=floors)
        return meter.forwards, found

    assert measured()[0] == 4
    forwards, raised = measured(chat=0.25)
    assert forwards == 2, "the sets without chat"
    assert measured(chat=0.25)[0] == 0
    forwards, higher = measured(chat=0.5)
    assert forwards == 2
    for one, other in zip(raised, higher, strict=True):
        changed = {names for names in one.losses if one.losses[names] != other.losses[names]}
        assert changed == {(), ("code",)} and one.base == other.base
    forwards, back = measured()
    assert forwards == 1, "code alone; the base was measured"
    assert all(item.losses[()] == item.base for item in back)
    measured(chat=0.25)
    with library.writing():
        library.remove_domain("chat")
    add_domain(library, base, "chat")
    library = Library.open(library.path)
    assert measured(chat=0.25)[0] == 4, "the same floor of other stacks"


def test_records_of_a_version_without_floors_are_read(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows = random_rows(8, Random(8))
    run(library, meter_of(library, base), rows, search="exhaustive")
    header, *lines = map(json.loads, records(library).splitlines())
    old = [{"stacks": header["stacks"]}, *({key: line[key] for key in ("row", "best", "losses")} for line in lines)]
    text = "".join(json.dumps(line) + "\n" for line in old)
    for floors, forwards in (({}, 0), ({"code": 0.5}, 2)):
        with library.writing():
            library.write_file("router/discovery/chat.jsonl", text.encode())
        meter = meter_of(library, base, batch_size=8)
        run(library, meter, rows, search="exhaustive", floors=floors)
        assert meter.forwards == forwards


def test_named_sets_are_measured_and_may_be_the_best(base: LlamaForCausalLM, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", base, FIVE, stacks=2)
    rows, meter = random_rows(16, Random(6)), meter_of(library, base)
    sets = [("own_label", ("code", "medical")), ("trained_with", tuple(FIVE[:3]))]
    with library.writing():
        found = discover(
            library, meter, {"chat": rows}, RouterArgs(search="greedy"), {row_key(row): sets for row in rows}
        )["chat"]
    for item in found:
        assert {(), tuple(FIVE), *(names for _, names in sets)} <= set(item.losses)
        cost = {names: loss + 0.01 * len(names) for names, loss in item.losses.items()}
        assert cost[item.best] == min(cost.values())


def cut_off(path: Path, library: Library) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def a_better_set(path: Path, library: Library) -> None:
    header, first, *rest = path.read_text().splitlines()
    line = json.loads(first)
    line["losses"] = {names: 0.0 if names == "code" else loss for names, loss in line["losses"].items()}
    path.write_text("\n".join([header, json.dumps(line), *rest]) + "\n")


def no_longer_listed(path: Path, library: Library) -> None:
    manifest = json.loads((library.path / "manifest.json").read_text())
    del manifest["records"]["router/discovery/chat.jsonl"]
    (library.path / "manifest.json").write_text(json.dumps(manifest))
    a_better_set(path, library)


def unknown_domain(path: Path, library: Library) -> None:
    text = path.read_text().replace('"code": ', '"law": ', 1)
    with library.writing():
        library.write_file("router/discovery/chat.jsonl", text.encode())


@pytest.mark.parametrize("damage", [cut_off, a_better_set, no_longer_listed, unknown_domain])
def test_records_that_were_altered_are_measured_again(
    base: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, Library], None]
) -> None:
    library = new_library(tmp_path / "library", base, FIVE[:2])
    rows, meter = random_rows(3, Random(3)), meter_of(library, base)
    found, text = run(library, meter, rows), records(library)
    first, path = meter.forwards, library.path / "router/discovery/chat.jsonl"
    damage(path, library)
    library = Library.open(library.path)
    assert run(library, meter, rows) == found
    assert meter.forwards == 2 * first and records(library) == text
    assert str(path) in caplog.text and "measured again" in caplog.text and library.verify() == []


class Doomed(LossMeter):
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
    rows, meter = random_rows(32, seeded_random()), meter_of(whole, base, batch_size=1)
    run(whole, meter, rows)
    doomed = Doomed(meter.model, meter.tuner, meter.domains, meter.stacks, 1)
    doomed.at = seeded_random().randrange(meter.forwards // 2, meter.forwards)
    assert in_fork(lambda: run(Library.open(folder), doomed, rows)) == -signal.SIGKILL
    killed = Library.open(folder)
    assert 1 < len(records(killed).splitlines()) < 33, "the kill came too early or too late to prove anything"
    resumed = meter_of(killed, base, batch_size=1)
    run(killed, resumed, rows)
    assert records(killed) == records(whole)
    assert 0 < resumed.forwards < meter.forwards
