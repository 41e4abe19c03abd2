"""Two processes on one machine: DDP and DeepSpeed's ZeRO stages make the library that one process makes."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.agreement import ENGINES, comparable_config, compare, with_engine
from support.processes import finish, start_ranks, start_train, train, train_ranks, wait_for

from axolotl_brainstacks.library import Library


@pytest.fixture(scope="module")
def single(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Library]:
    """The config, and the library of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("single")
    config = comparable_config(tiny_llama_dir, folder) | {"micro_batch_size": 4, "max_grad_norm": 0.3}
    train(config, folder)
    return config, Library.open(folder / "out" / "library")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(single: tuple[dict[str, Any], Library], tmp_path: Path, engine: str) -> None:
    config, alone = single
    config = with_engine(config | {"micro_batch_size": 2, "output_dir": str(tmp_path / "out")}, engine, tmp_path)
    log = train_ranks(config, tmp_path)
    assert "2 processes" in log
    if engine != "ddp":
        assert f"DeepSpeedEngine, ZeRO stage {engine[-1]}" in log
    together = Library.open(tmp_path / "out" / "library")
    assert together.verify() == []
    assert together.manifest.base == alone.manifest.base, "parameters in shards are sampled as whole ones are"
    for stack in together.manifest.stacks:
        tensors = together.stack_tensors(stack.name)
        assert all(tensor.any() for key, tensor in tensors.items() if key.endswith("brainstacks_B.weight"))
    found = compare(together, alone)
    assert found.same_shapes
    assert found.loss_difference < 1e-4
    assert found.weight_difference < 1e-3
    if engine == "zero3":
        reopen_and_finish(config, tmp_path, together)


def reopen_and_finish(config: dict[str, Any], folder: Path, library: Library) -> None:
    """As if killed after the last round's record: the base model is in shards, and no stage is left to train."""
    manifest, forgetting = library.manifest, library.path / "report/forgetting.json"
    measured = forgetting.read_text()
    with library.writing():
        library.update_domain("math", done=False)
        library.write_file("report/forgetting.json", json.dumps(json.loads(measured)[:1]).encode())
    train_ranks(config, folder)
    assert Library.open(library.path).manifest == manifest
    assert json.loads(forgetting.read_text()) == json.loads(measured)


def test_the_router_of_a_model_in_shards(single: tuple[dict[str, Any], Library], tmp_path: Path) -> None:
    config, alone = single
    library = shutil.copytree(alone.path, tmp_path / "library")
    finish([start_train(config, tmp_path, command="router")], tmp_path)
    config = with_engine(config, "zero3", tmp_path)
    config["brainstacks"] = config["brainstacks"] | {"library": str(library)}
    finish(start_ranks(config, tmp_path, command="router"), tmp_path)
    expected, found = (json.loads((of / "router/evaluation.json").read_text()) for of in (alone.path, library))
    for source, losses in expected["losses"].items():
        assert found["losses"][source] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert Library.open(library).verify() == []


def test_nodes_with_disks_of_their_own(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A library and checkpoints on the first node's disk, checkpoints on the second one's; stopped once, and resumed.
    The base model is in 4-bit, a step of two accumulated micro-batches with clipped gradients."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    config = comparable_config(tiny_llama_dir, tmp_path) | {
        "output_dir": "out",
        "dataset_prepared_path": "prepared",
        "max_steps": 8,
        "load_in_4bit": True,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.3,
    }
    config = with_engine(config, "zero2", tmp_path)
    processes = start_ranks(config, tmp_path, nodes)
    wait_for(processes, tmp_path, "math/round1/loss")
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    finish(processes, tmp_path, expect=128 + signal.SIGTERM)
    for rank, node in enumerate(nodes):
        (checkpoint,) = (node / "out").glob("stages/math-1/checkpoint-*")
        assert (checkpoint / f"rng_state_{rank}.pth").exists()
    assert not (nodes[1] / "out" / "library").exists()

    log = train_ranks(config, tmp_path, nodes, expect=1)
    assert "The library out/library is not the same for all processes: manifest" in log
    assert "nothing there for rank 1 on" in log
    shutil.copytree(nodes[0] / "out" / "library", nodes[1] / "out" / "library")
    log = train_ranks(config, tmp_path, nodes)
    assert "Resuming math, round 1" in log and "4-bit layers: 14 of 14" in log
    library = Library.open(nodes[0] / "out" / "library")
    assert library.verify() == [] and all(domain.done for domain in library.manifest.domains)
    assert not any((node / "out" / "stages").exists() for node in nodes)
