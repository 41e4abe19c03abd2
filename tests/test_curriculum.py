"""A whole curriculum through Axolotl's train command, on a tiny model: what is in the library, and that it is true."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.base_models import make_old
from support.curricula import curriculum_config, write_domain
from support.models import base_config, chat_dataset
from support.processes import train
from support.seeds import seeded_random
from transformers import AutoModelForCausalLM

from axolotl_brainstacks.adapter.nullspace import leakage
from axolotl_brainstacks.calibration import merge_columns
from axolotl_brainstacks.evaluation import mean_loss, unpack_rows
from axolotl_brainstacks.library import Library


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("curriculum")
    config = curriculum_config(tiny_llama_dir, folder, ["chat", "code", "math"])
    config["use_tensorboard"] = True
    config["brainstacks"]["domains"][1] |= {"max_steps": 6, "learning_rate": 8e-3, "gradient_accumulation_steps": 2}
    return config, folder, train(config, folder)


@pytest.fixture(scope="module")
def library(run: tuple[dict[str, Any], Path, str]) -> Library:
    return Library.open(run[1] / "out" / "library")


@pytest.fixture(scope="module")
def loaded(run: tuple[dict[str, Any], Path, str]) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(run[0]["base_model"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(run[1] / "out" / "library")).eval()


def test_library_is_whole_and_every_round_is_recorded(library: Library) -> None:
    assert library.verify() == []
    assert [entry.name for entry in library.manifest.domains] == ["chat", "code", "math"]
    for entry in library.manifest.domains:
        assert entry.done
        kept = [record for record in entry.rounds if record.kept]
        assert kept and kept[-1].loss_after < entry.base_loss
        losses = [kept[0].loss_before, *(record.loss_after for record in kept)]
        assert losses == sorted(losses, reverse=True)
    assert [record.steps for record in library.manifest.domain("code").rounds] == [6, 6]


def test_tensorboard_keeps_the_logs_of_every_stage(run: tuple[dict[str, Any], Path, str]) -> None:
    logs = {path.parent.name for path in (run[1] / "out" / "runs").glob("*/events.out.tfevents.*")}
    assert logs == {f"{domain}-{number}" for domain in ("chat", "code", "math") for number in (1, 2)}


def test_losses_with_the_same_stacks_on_never_change(library: Library) -> None:
    matrix = json.loads((library.path / "report/forgetting.json").read_text())
    assert [row["after"] for row in matrix] == ["chat", "code", "math"]
    for later in matrix[1:]:
        for name, loss in later["own_stacks"].items():
            first = next(row for row in matrix if row["after"] == name)
            assert loss == first["own_stacks"][name]
    for entry in library.manifest.domains:
        kept = [record for record in entry.rounds if record.kept]
        own = next(row for row in matrix if row["after"] == entry.name)["own_stacks"][entry.name]
        assert own == kept[-1].loss_after


def test_peft_computes_what_the_trainer_computed(library: Library, loaded: PeftModel) -> None:
    for entry in library.manifest.domains:
        rows = unpack_rows(library.validation(entry.name))
        with loaded.base_model.using_stacks(entry.context):
            loss = mean_loss(loaded, rows, 2)
        assert loss == [record for record in entry.rounds if record.kept][-1].loss_after


def test_output_dir_is_a_peft_folder_of_the_library(run: tuple[dict[str, Any], Path, str], loaded: PeftModel) -> None:
    base = AutoModelForCausalLM.from_pretrained(run[0]["base_model"], dtype=torch.float32)
    other = PeftModel.from_pretrained(base, str(run[1] / "out")).eval()
    tokens = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, loaded(tokens).logits)


def test_stacks_on_disk_stay_out_of_the_null_space(library: Library) -> None:
    fitted: list[dict[str, torch.Tensor]] = []
    for before, entry in pairwise(library.manifest.domains):
        fitted.append(library.protection(before.name))
        for stack in (stack for stack in library.manifest.stacks if stack.domain == entry.name):
            tensors = library.stack_tensors(stack.name)
            for module, basis in merge_columns(fitted).items():
                assert basis.shape[1] >= 1
                assert leakage(tensors[f"base_model.model.{module}.brainstacks_B.weight"], basis) < 1e-5


def test_metrics_carry_domain_and_round(run: tuple[dict[str, Any], Path, str]) -> None:
    log = run[2]
    for key in ("chat/round1/loss", "code/round2/eval_loss", "math/round1/balance_loss", "math/round2/expert_use_max"):
        assert key in log


def test_samples_are_written_after_every_stack(library: Library) -> None:
    lines = [json.loads(line) for line in (library.path / "report/samples.jsonl").read_text().splitlines()]
    assert {(line["domain"], line["round"]) for line in lines} == {(s.domain, s.round) for s in library.manifest.stacks}
    assert all("Double" in line["prompt"] for line in lines)


def test_a_finished_curriculum_is_not_trained_again(run: tuple[dict[str, Any], Path, str], library: Library) -> None:
    before = (library.path / "manifest.json").read_bytes()
    assert "nothing to do" in train(run[0], run[1])
    assert (library.path / "manifest.json").read_bytes() == before


def test_one_domain_goes_onto_an_existing_library(
    run: tuple[dict[str, Any], Path, str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows = write_domain(tmp_path / "legal.jsonl", "legal", 40, seeded_random())
    path = run[1] / "out" / "library"
    config = base_config(
        tiny_llama_dir, tmp_path / "out", adapter="brainstacks", datasets=[chat_dataset(rows)], val_set_size=0.2,
        learning_rate=5e-3, brainstacks={"library": str(path), "domain": "legal", "null_space": {"directions": 4}},
    )  # fmt: skip
    before = {entry.name: entry.context for entry in Library.open(path).manifest.domains}
    base = make_old(Library.open(path))
    train(config, tmp_path)
    after = Library.open(path)
    assert after.manifest.base == base and base.weights is not None
    assert after.verify() == []
    legal = after.manifest.domain("legal")
    assert legal.done and legal.constraint and legal.constraint.protects == ["chat", "code", "math"]
    assert {entry.name: entry.context for entry in after.manifest.domains if entry.name != "legal"} == before
    assert "`legal` is already in the library" in train(config, tmp_path, expect=1)


def test_stacks_kept_in_bf16_are_measured_loaded_and_added_to_as_such(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(
        tiny_llama_dir, tmp_path, ["chat", "code"], frozen_dtype="bfloat16", boosting={"max_rounds": 1}
    )
    train(config, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    base = AutoModelForCausalLM.from_pretrained(config["base_model"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
    for row in json.loads((library.path / "report/forgetting.json").read_text()):
        for name, loss in row["own_stacks"].items():
            entry = library.manifest.domain(name)
            with loaded.base_model.using_stacks(entry.context):
                assert mean_loss(loaded, unpack_rows(library.validation(name)), 2) == loss == entry.last_loss
    banks = [buffer for layer in loaded.base_model.brainstacks_layers() for buffer in layer.bank.buffers()]
    assert banks and {buffer.dtype for buffer in banks} == {torch.bfloat16}
    assert library.stack_tensors("s001_chat").popitem()[1].dtype == torch.float32
    config["brainstacks"]["domains"] += curriculum_config(tiny_llama_dir, tmp_path, ["math"])["brainstacks"]["domains"]
    train(config, tmp_path)
    row = json.loads((library.path / "report/forgetting.json").read_text())[-1]
    after = Library.open(library.path).manifest
    assert row["after"] == "math" and row["own_stacks"] == {entry.name: entry.last_loss for entry in after.domains}
    with pytest.raises(ValueError, match="left out, but the library's stacks are kept as bfloat16: set it to bfloat16"):
        after.check_frozen_dtype(None)


def test_isolated_domains_do_not_see_each_other(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(
        tiny_llama_dir, tmp_path, ["chat", "code"], context="isolated", null_space={"samples": 16}
    )
    train(config, tmp_path)
    manifest = Library.open(tmp_path / "out" / "library").manifest
    for entry in manifest.domains:
        assert entry.context == [stack.name for stack in manifest.stacks if stack.domain == entry.name]
        assert entry.constraint is None and entry.protection is None, "independent: kept out of nothing by default"
        first = next(record for record in entry.rounds if record.round == 1)
        assert first.loss_before == entry.base_loss
