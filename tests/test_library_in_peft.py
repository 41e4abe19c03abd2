"""A library as a PEFT folder: any PEFT program loads it, and it equals the trainer's model."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from support.wrapped import assert_near, freeze, llama, load_base, logits, tokens, tuner_of, wrap
from support.wrapped import base_dir as base_dir

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.library import DomainEntry, Library, RoundRecord
from axolotl_brainstacks.library.base_model import BaseModelInfo


def make_library(folder: Path, base_dir: Path, model: PeftModel, domains: list[str]) -> Library:
    """A library of random stacks, which are attached to `model` too."""
    library = Library.create(folder, BaseModelInfo.of(tuner_of(model).model, str(base_dir)))
    with library.writing():
        for number, domain in enumerate(domains, start=1):
            tensors = freeze(model, [f"s{number:03d}_{domain}"], domain)[f"s{number:03d}_{domain}"]
            record = RoundRecord(round=1, kept=True, loss_before=2.0, loss_after=1.0, steps=1, stop_reason="finished")
            library.add_domain(DomainEntry(name=domain, base_loss=2.0))
            library.add_stack(domain, 1, model.peft_config["default"].to_dict(), tensors, record)
            library.update_domain(domain, done=True)
        library.write_root_config(BrainstacksConfig.for_library(str(base_dir), ".").to_dict())
    return library


@pytest.fixture
def trained(base_dir: Path) -> PeftModel:
    return wrap(load_base(base_dir))


@pytest.fixture
def library(base_dir: Path, trained: PeftModel, tmp_path: Path) -> Library:
    return make_library(tmp_path / "library", base_dir, trained, ["chat", "code", "math"])


@pytest.mark.parametrize("moved", [False, True])
def test_a_library_is_a_peft_folder_and_equals_the_trainers_model(
    base_dir: Path, trained: PeftModel, library: Library, tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, path = tokens(), library.path
    with trained.disable_adapter():
        expected = logits(trained, ids)
    if moved:
        path = Path(shutil.move(path, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    for name in (str(path), path.name):
        model = PeftModel.from_pretrained(load_base(base_dir), name)
        assert float((logits(model, ids) - expected).abs().max()) == 0.0
        assert [stack.domain for stack in tuner_of(model).stacks] == ["chat", "code", "math"]
    automatic = AutoPeftModelForCausalLM.from_pretrained(str(path))
    assert float((logits(automatic, ids) - expected).abs().max()) == 0.0


def test_one_stack_of_a_library_is_a_peft_folder_too(base_dir: Path, trained: PeftModel, library: Library) -> None:
    ids = tokens()
    tuner_of(trained).use_stacks(["s002_code"])
    with trained.disable_adapter():
        expected = logits(trained, ids)
    model = PeftModel.from_pretrained(load_base(base_dir), str(library.stack_path("s002_code")))
    assert_near(logits(model, ids), expected, 1e-4)


def test_a_folder_that_points_at_a_library_loads_it(base_dir: Path, trained: PeftModel, library: Library) -> None:
    output = library.path.parent / "output"
    config = BrainstacksConfig.for_library(str(base_dir), "../library")
    config.save_pretrained(str(output))
    save_file({}, output / "adapter_model.safetensors")
    ids = tokens()
    with trained.disable_adapter():
        expected = logits(trained, ids)
    model = PeftModel.from_pretrained(load_base(base_dir), str(output))
    assert torch.equal(logits(model, ids), expected)
    again = BrainstacksConfig.from_pretrained(str(output.parent), subfolder="output")
    assert again.library == str(library.path.resolve())


def test_a_new_stack_on_a_library_trains_and_a_second_library_is_refused(
    base_dir: Path, trained: PeftModel, library: Library, tmp_path: Path
) -> None:
    ids = tokens()
    model = get_peft_model(
        load_base(base_dir), BrainstacksConfig(r=2, task_type="CAUSAL_LM", library=str(library.path))
    )
    with trained.disable_adapter():
        assert torch.equal(logits(model, ids), logits(trained, ids))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.add_adapter("ref", model.peft_config["default"])
    assert len(tuner_of(model).stacks) == 3, "the copy of an adapter attaches its library again"
    other = make_library(tmp_path / "other", base_dir, wrap(load_base(base_dir)), ["law"])
    with pytest.raises(ValueError, match="has stacks already"):
        model.load_adapter(str(other.path), "law")


def test_a_library_loaded_after_the_first_adapter_is_attached(
    base_dir: Path, trained: PeftModel, library: Library
) -> None:
    model, ids = wrap(load_base(base_dir)), tokens()
    model.load_adapter(str(library.path), "library")
    with trained.disable_adapter():
        assert torch.equal(logits(model, ids), logits(trained, ids))


def test_a_config_that_lost_its_folder_is_refused(base_dir: Path, library: Library) -> None:
    config = PeftConfig.from_pretrained(str(library.path))
    with pytest.raises(ValueError, match=r"`library` is '\.'.*adapter_config\.json.*from_pretrained"):
        PeftModel.from_pretrained(load_base(base_dir), str(library.path), config=config)


def test_a_library_of_another_base_model_is_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="base_model"):
        PeftModel.from_pretrained(llama(), str(library.path))


def test_transformers_own_loading_takes_a_stack_and_refuses_a_library(base_dir: Path, library: Library) -> None:
    ids, stack = tokens(), str(library.stack_path("s002_code"))
    expected = logits(PeftModel.from_pretrained(load_base(base_dir), stack), ids)
    model = load_base(base_dir)
    model.load_adapter(stack)
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(load_base(Path(stack)), ids), expected)
    # It would keep the base model's own `generate`, which no router reaches.
    for load in (lambda: load_base(base_dir).load_adapter(str(library.path)), lambda: load_base(library.path)):
        with pytest.raises(ValueError, match=r"`library`.*PeftModel\.from_pretrained"):
            load()
