"""GRPO as a round of a domain, by the real command on a tiny model: its reward is the share of lower-case letters."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.agreement import with_engine
from support.curricula import contents
from support.processes import start_train, train, train_ranks, wait_for
from support.rl_curricula import rewarded, stack_hashes

from axolotl_brainstacks.library import Library


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("grpo")
    config = rewarded(tiny_llama_dir, folder)
    return config, folder, train(config, folder)


def test_the_held_out_reward_rises_and_the_stack_is_kept(run: tuple[dict[str, Any], Path, str]) -> None:
    library = Library.open(run[1] / "out" / "library")
    assert library.verify() == []
    supervised, grpo = library.manifest.domain("chat").rounds
    assert supervised.rl is None and grpo.rl == "grpo" and grpo.kept
    assert grpo.objective_after > grpo.objective_before  # type: ignore[operator]
    assert library.stack_config("s002_chat")["noisy_gate"] is False
    assert "chat/round2/reward" in run[2]


def test_stopped_and_resumed(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """Sampled answers come out the same, because the random state is part of a checkpoint."""
    config = run[0] | {"output_dir": str(tmp_path / "out"), "dataloader_num_workers": 1}
    process = start_train(config, tmp_path)
    log = wait_for([process], tmp_path, "chat/round2/loss")
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)  # the data loader's worker too
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "Stopped. The checkpoint of chat, round 2" in log.read_text()
    train(config, tmp_path)
    assert "Resuming chat, round 2" in log.read_text()
    assert contents(tmp_path / "out" / "library") == contents(run[1] / "out" / "library")


def test_between_two_generations_there_is_no_checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = rewarded(tiny_llama_dir, tmp_path)
    config["brainstacks"]["domains"][0]["rl_rounds"][0]["trl"]["num_iterations"] = 16
    process = start_train(config, tmp_path)
    log = wait_for([process], tmp_path, "chat/round2/loss")
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    last = log.read_text().splitlines()[-1]
    assert (
        "Stopped. There is no complete checkpoint of chat, round 2 yet; the same command begins the round again" in last
    )


def test_a_reward_that_is_not_finite_ends_the_round(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = rewarded(tiny_llama_dir, tmp_path, "infinite_later")
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    grpo = library.manifest.domain("chat").rounds[1]
    assert "infinite_later" in grpo.stop_reason and "inf" in grpo.stop_reason and grpo.steps == 3
    # The weights from before may have earned more on held-out prompts already.
    assert grpo.kept == (grpo.objective_after > grpo.objective_before)  # type: ignore[operator]
    assert library.manifest.domain("chat").done and library.verify() == []


def test_an_exploding_learning_rate_leaves_the_library_as_it_was(
    run: tuple[dict[str, Any], Path, str], tmp_path: Path
) -> None:
    domain = run[0]["brainstacks"]["domains"][0]
    exploding = domain["rl_rounds"][0] | {"learning_rate": 1e7}
    block = run[0]["brainstacks"] | {"domains": [domain | {"rl_rounds": [exploding]}]}
    train(run[0] | {"output_dir": str(tmp_path / "out"), "brainstacks": block}, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    grpo = library.manifest.domain("chat").rounds[1]
    assert not grpo.kept and grpo.dropped and grpo.steps < 16, grpo
    supervised = stack_hashes(Library.open(run[1] / "out" / "library"))["s001_chat"]
    assert stack_hashes(library) == {"s001_chat": supervised} and library.verify() == []


def test_two_ranks_under_zero2_and_a_4_bit_base(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = rewarded(tiny_llama_dir, tmp_path, max_steps=4) | {"load_in_4bit": True}
    log = train_ranks(with_engine(config, "zero2", tmp_path), tmp_path)
    assert "2 processes" in log and "4-bit layers: 14 of 14" in log
    library = Library.open(tmp_path / "out" / "library")
    assert library.verify() == [] and library.manifest.domain("chat").rounds[1].rl == "grpo"
