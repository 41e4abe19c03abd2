"""What conftest.py promises of every test: its numbers can be drawn again, its tier is right, nothing that it starts stays."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from support import processes
from support.seeds import VARIABLE, seed_everything, seed_of, seeded_random
from support.tiers import reachable


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(())), seeded_random().random()]


def test_numbers_follow_from_the_name_and_the_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything("one")
    first = draw()
    seed_everything("one")
    assert draw() == first
    seed_everything("other")
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    before = seed_of("one")
    monkeypatch.setenv(VARIABLE, "another")
    assert seed_of("one") != before


@pytest.mark.parametrize("again", [False, True])
def test_each_test_draws_numbers_of_its_own(again: bool, request: pytest.FixtureRequest) -> None:
    drawn = draw()
    seed_everything(request.node.nodeid)
    assert drawn == draw(), "seeded by its id before it began"


def test_a_failure_tells_the_seed(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text("def test_failing(): assert False\n")
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    environment = os.environ | {VARIABLE: "831", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert f"{VARIABLE}=831" in done.stdout


def starts_two() -> None:
    return processes_of_two_ranks()


def processes_of_two_ranks() -> None:
    start_ranks({}, Path())


def starts_none() -> None:
    torch.nn.Linear(2, 2).train()


start_ranks = processes.start_ranks


def test_what_a_test_can_start_is_found_through_its_helpers() -> None:
    assert "start_ranks" in reachable(starts_two)
    assert reachable(starts_none) == {"starts_none"}


def sleep_with_a_child(pid: Connection) -> None:
    os.setsid()
    pid.send(subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def test_a_process_that_hangs_is_killed_with_its_children() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=sleep_with_a_child, args=(sender,))
    process.start()
    child = receiver.recv()
    processes.kill_children()
    assert not process.is_alive()
    deadline = time.monotonic() + 60
    status = Path(f"/proc/{child}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child of the killed process still runs"
        time.sleep(0.05)
