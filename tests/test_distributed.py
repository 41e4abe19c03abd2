"""Two processes on one machine: DDP and DeepSpeed's ZeRO stages make the library that one process makes."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import cli_environment
from processes import train
from test_curriculum import curriculum_config

from axolotl_brainstacks.library import Library

ENGINES = ["ddp", "zero2", "zero3"]


def engine_config(engine: str) -> dict[str, Any]:
    """As Axolotl's own deepspeed_configs, in fp32."""
    zero: dict[str, Any] = {"stage": int(engine[-1]), "overlap_comm": engine != "zero3"}
    if engine == "zero3":
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return {
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }


def train_on_two(config: dict[str, Any], folder: Path, timeout: float = 600) -> str:
    """Run `config` with two processes; returns what they printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
        str(Path(__file__).with_name("launch_cpu.py")), str(folder / "config.yml"),
    ]  # fmt: skip
    environment = cli_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)})
    if "deepspeed" in config:
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def single(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Library]:
    """The config, and the library of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("single")
    config = curriculum_config(tiny_llama_dir, folder, ["chat", "code"], noisy_gate=False)
    # In order, because one process and two shuffle differently.
    config |= {"micro_batch_size": 4, "max_grad_norm": 0.3, "curriculum_sampling": True, "learning_rate": 3e-3}
    train(config, folder)
    return config, Library.open(folder / "out" / "library")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(single: tuple[dict[str, Any], Library], tmp_path: Path, engine: str) -> None:
    config, alone = single
    config = config | {"micro_batch_size": 2, "output_dir": str(tmp_path / "out")}
    if engine != "ddp":
        path = tmp_path / f"{engine}.json"
        path.write_text(json.dumps(engine_config(engine)))
        config["deepspeed"] = str(path)
    log = train_on_two(config, tmp_path)
    assert "2 processes" in log
    if engine != "ddp":
        assert f"DeepSpeedEngine, ZeRO stage {engine[-1]}" in log
    together = Library.open(tmp_path / "out" / "library")
    assert together.verify() == []
    assert [s.name for s in together.manifest.stacks] == [s.name for s in alone.manifest.stacks]
    for stack in alone.manifest.stacks:
        mine, theirs = together.stack_tensors(stack.name), alone.stack_tensors(stack.name)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        assert all(v.any() for k, v in mine.items() if k.endswith("brainstacks_B.weight"))
    for one, two in zip(alone.manifest.domains, together.manifest.domains, strict=True):
        assert two.base_loss == pytest.approx(one.base_loss, rel=1e-6)
        for a, b in zip(one.rounds, two.rounds, strict=True):
            assert b.loss_after == pytest.approx(a.loss_after, rel=2e-2)
