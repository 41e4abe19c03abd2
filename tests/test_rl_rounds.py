"""Preference learning as rounds of a domain, by the real command on a tiny model."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.agreement import with_engine
from support.curricula import contents, curriculum_config
from support.preferences import labelled, pairs
from support.processes import start_train, train, train_ranks, wait_for
from support.rl_curricula import preferring, stack_hashes
from transformers import AutoModelForCausalLM

from axolotl_brainstacks.library import Library


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Two domains; the first has DPO and KTO after its supervised rounds."""
    folder = tmp_path_factory.mktemp("rl")
    config = preferring(
        curriculum_config(tiny_llama_dir, folder, ["chat", "code"], boosting={"max_rounds": 1, "min_loss_delta": 0.0}),
        {"rl": "dpo", "max_steps": 12, "learning_rate": 3e-3, **pairs(folder)},
        {"rl": "kto", "max_steps": 12, "learning_rate": 3e-3, "micro_batch_size": 4, **labelled(folder)},
        rl={"max_loss_increase": 5.0},
    )
    train(config, folder)
    return config, folder


@pytest.fixture(scope="module")
def library(run: tuple[dict[str, Any], Path]) -> Library:
    return Library.open(run[1] / "out" / "library")


def test_every_kept_round_is_said_to_be(run: tuple[dict[str, Any], Path]) -> None:
    log = (run[1] / "train.log").read_text()
    for said in (
        "chat, round 1 is kept: stack s001_chat",
        "chat, round 2 (dpo) is kept: stack s002_chat",
        "chat, round 3 (kto) is kept: stack s003_chat",
        "code, round 1 is kept: stack s004_code",
    ):
        assert log.count(said) == 1, said


def test_rl_rounds_belong_to_their_domain(library: Library) -> None:
    assert library.verify() == []
    assert [entry.name for entry in library.manifest.domains] == ["chat", "code"]
    chat = library.manifest.domain("chat")
    assert [record.rl for record in chat.rounds] == [None, "dpo", "kto"]
    assert [record.kept for record in chat.rounds] == [True, True, True]
    own = [stack.name for stack in library.manifest.stacks if stack.domain == "chat"]
    assert chat.context == own and len(own) == 3
    matrix = json.loads((library.path / "report/forgetting.json").read_text())
    assert [row["after"] for row in matrix] == ["chat", "code"]
    assert matrix[1]["own_stacks"]["chat"] == chat.rounds[-1].loss_after


def test_the_reference_is_the_model_without_the_stack(library: Library) -> None:
    """Then the policy is the reference before the first step, and the loss of DPO is ln 2."""
    dpo = library.manifest.domain("chat").rounds[1]
    assert dpo.objective_before == pytest.approx(math.log(2), abs=1e-6)
    assert dpo.objective_after is not None and dpo.objective_after < 0.6
    assert dpo.metrics["rewards/margins_before"] == 0 and dpo.metrics["rewards/margins_after"] > 0
    assert dpo.loss_before == library.manifest.domain("chat").rounds[0].loss_after


def test_supervised_stacks_are_those_of_a_run_without_rl(
    run: tuple[dict[str, Any], Path], library: Library, tmp_path: Path
) -> None:
    config = preferring(run[0]) | {"output_dir": str(tmp_path / "out")}
    config["brainstacks"] |= {"domains": config["brainstacks"]["domains"][:1]}
    train(config, tmp_path)
    without = stack_hashes(Library.open(tmp_path / "out" / "library"))
    assert without == {"s001_chat": stack_hashes(library)["s001_chat"]}


def test_peft_answers_with_all_of_the_domain(run: tuple[dict[str, Any], Path], library: Library) -> None:
    base = AutoModelForCausalLM.from_pretrained(run[0]["base_model"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
    with loaded.base_model.routed(domains={"chat": 1.0}):
        assert loaded.base_model.selection.wanted.names == ("s001_chat", "s002_chat", "s003_chat")


def test_other_kinds_of_preference_learning(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    shared = {"max_steps": 8, "learning_rate": 2e-3, **pairs(tmp_path)}
    kinds = [{"rl": "ipo"}, {"rl": "simpo", "rl_beta": 2.0}, {"rl": "orpo", "orpo_alpha": 0.1}]
    train(preferring(config, *(kind | shared for kind in kinds), rl={"max_loss_increase": 5.0}), tmp_path)
    rounds = Library.open(tmp_path / "out" / "library").manifest.domain("chat").rounds[1:]
    assert [record.rl for record in rounds] == ["ipo", "simpo", "orpo"]
    for record in rounds:
        assert record.kept and record.objective_after < record.objective_before  # type: ignore[operator]


def test_on_a_4_bit_base_rl_trains_in_fp32(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """TRL makes what it trains bf16 there."""
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    dpo = {"rl": "dpo", "max_steps": 12, "learning_rate": 3e-3, **pairs(tmp_path)}
    log = train(preferring(config | {"load_in_4bit": True}, dpo, rl={"max_loss_increase": 5.0}), tmp_path)
    assert "4-bit layers: 14 of 14" in log
    library = Library.open(tmp_path / "out" / "library")
    assert library.manifest.domain("chat").rounds[1].objective_before == pytest.approx(math.log(2), abs=1e-6)
    for key, tensor in library.stack_tensors("s002_chat").items():
        assert not tensor.equal(tensor.bfloat16().float()), key


def test_a_learning_rate_that_explodes_leaves_the_library_as_it_was(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    dpo = {"rl": "dpo", "max_steps": 20, "learning_rate": 1e6, **pairs(tmp_path)}
    train(preferring(config, dpo), tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    supervised, poisoned = library.manifest.domain("chat").rounds
    assert not poisoned.kept and poisoned.dropped and poisoned.steps < 20
    assert poisoned.stop_reason in ("spike", "non-finite loss")
    assert list(stack_hashes(library)) == ["s001_chat"] and library.manifest.domain("chat").done
    assert library.manifest.domain("chat").last_loss == supervised.loss_after and library.verify() == []


def test_a_round_may_not_cost_the_domain_more_than_the_bound(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    own = {"brainstacks": {"rl": {"max_loss_increase": 0.0}}}
    dpo = {"rl": "dpo", "max_steps": 12, "learning_rate": 1e-2, **pairs(tmp_path)}
    train(preferring(config, dpo | own), tmp_path)
    record = Library.open(tmp_path / "out" / "library").manifest.domain("chat").rounds[1]
    assert record.objective_after < record.objective_before and record.loss_after > record.loss_before  # type: ignore[operator]
    assert not record.kept and "brainstacks.rl.max_loss_increase" in str(record.dropped)


def test_stopped_and_resumed_in_an_rl_round(run: tuple[dict[str, Any], Path], library: Library, tmp_path: Path) -> None:
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
    assert contents(tmp_path / "out" / "library") == contents(library.path)


def test_two_ranks_under_zero2_make_the_same_library_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat"], boosting={"max_rounds": 1, "min_loss_delta": 0.0})
    dpo = {"rl": "dpo", "max_steps": 6, "learning_rate": 3e-3, "micro_batch_size": 1, **pairs(tmp_path)}
    config = with_engine(preferring(config, dpo, rl={"max_loss_increase": 5.0}), "zero2", tmp_path)
    made = []
    for name in ("once", "again"):
        log = train_ranks(config | {"output_dir": str(tmp_path / name)}, tmp_path)
        library = Library.open(tmp_path / name / "library")
        made.append(contents(library.path))
        assert "2 processes" in log and library.verify() == []
    assert made[0] == made[1]
    record = library.manifest.domain("chat").rounds[1]
    assert record.rl == "dpo" and record.kept and record.objective_before == pytest.approx(math.log(2), abs=1e-6)
