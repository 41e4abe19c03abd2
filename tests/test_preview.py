"""The plan that `axolotl preprocess` and `axolotl train` print: its rows, steps, stacks and bytes are what comes of it."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log
from peft import get_peft_model
from support.curricula import curriculum_config, write_domain
from support.models import base_config, chat_dataset, tiny_llama
from support.preferences import pairs
from support.processes import train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_brainstacks.curriculum.build import ADAPTER_NAME, stack_config
from axolotl_brainstacks.curriculum.preflight import TrainingRun
from axolotl_brainstacks.curriculum.preview import DomainPreview, Preview, preview, size
from axolotl_brainstacks.curriculum.sizes import Sizes, base_bytes, meta_model, safetensors_bytes, state_bytes
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.storage import tensors_to_bytes
from axolotl_brainstacks.serving.model import BrainstacksModel


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """A run that has trained `chat` and `code`."""
    folder = tmp_path_factory.mktemp("preview")
    config = curriculum_config(tiny_llama_dir, folder, ["chat", "code"])
    return config, folder, train(config, folder)


def loaded(config: dict[str, Any], preprocess: bool = False) -> TrainingRun:
    """The run after what `axolotl train` (or `preprocess`) does until the model is loaded."""
    manager = PluginManager.get_instance()
    try:
        manager.load_datasets(load_cfg(DictDefault(copy.deepcopy(config))), preprocess=preprocess)
    finally:
        close_debug_log()
    run = manager.plugins["axolotl_brainstacks.BrainstacksPlugin"].run
    assert isinstance(run, TrainingRun)
    return run


def previewed(training: TrainingRun, count_raw: bool) -> Preview:
    return preview(training.plan, training.stages, count_raw)


def three_domains(run: tuple[dict[str, Any], Path, str], folder: Path) -> dict[str, Any]:
    """The run's config with a third domain, whose settings are its own."""
    config, rng = copy.deepcopy(run[0]), Random(0)
    rows = write_domain(folder / "math.jsonl", "math", 40, rng)
    turns = [{"role": "user", "content": "Double 0"}, {"role": "assistant", "content": "01 " * 400}]
    with rows.open("a") as file:
        file.write((json.dumps({"messages": turns}) + "\n") * 3)
    config["output_dir"] = str(folder / "out")
    config["brainstacks"]["library"] = str(run[1] / "out" / "library")
    config["brainstacks"]["domains"].append({
        "name": "math", "datasets": [chat_dataset(rows)], "val_set_size": 0.25, "max_steps": 5,
        "gradient_accumulation_steps": 3, "sequence_len": 128,
        "brainstacks": {"boosting": {"max_rounds": 4}, "null_space": {"directions": 3}},
        "rl_rounds": [{"rl": "dpo", "max_steps": 7, **pairs(folder)}],
    })  # fmt: skip
    return config


def test_the_plan_counts_rows_steps_and_stacks(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    made = previewed(loaded(three_domains(run, tmp_path)), count_raw=True)
    manifest = Library.open(run[1] / "out" / "library").manifest
    held = {name: sum(stack.domain == name for stack in manifest.stacks) for name in ("chat", "code")}
    assert made.domains[:2] == [
        DomainPreview(name, count, done=True, protected=name == "chat") for name, count in held.items()
    ]
    assert made.domains[2] == DomainPreview(
        "math", stacks=5, rounds=4, rl_rounds=("dpo",), training_rows=30, dropped_rows=3, validation_rows=10, kept_rows=10,
        steps=5, rl_steps=(7,), tokens_per_step=2 * 3 * 128, directions=3, samples=16, min_capacity=0.25,
    )  # fmt: skip
    assert made.total_steps == 4 * 5 + 7
    assert made.stacks == sum(held.values()) + 5
    assert made.all_columns == manifest.domain("chat").protection.columns + 3  # type: ignore[union-attr]


def test_domains_that_the_yaml_does_not_name_count_too(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    config = three_domains(run, tmp_path)
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][2:]
    made = previewed(loaded(config), count_raw=False)
    manifest = Library.open(run[1] / "out" / "library").manifest
    assert [domain.name for domain in made.domains] == ["math"] and made.domains[0].dropped_rows is None
    assert made.stacks == len(manifest.stacks) + 5


def test_steps_without_max_steps_are_counted(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    config = three_domains(run, tmp_path)
    math = config["brainstacks"]["domains"][2]
    del math["max_steps"]
    math["num_epochs"] = 2
    assert previewed(loaded(config), count_raw=False).domains[2].steps == 2 * 30 // (2 * 3)


def test_preprocess_prints_a_table_and_train_its_summary(
    run: tuple[dict[str, Any], Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded(three_domains(run, tmp_path), preprocess=True)
    whole = capsys.readouterr().out
    (math,) = [line for line in whole.splitlines() if "math" in line and "│" in line]
    cells = [cell.strip() for cell in math.split("│")[1:-1]]
    assert cells == ["math", "30", "3", "10 (10)", "5", "4", "dpo 7", "768", "5"]
    assert [line for line in whole.splitlines() if "│ chat" in line and "done" in line]
    for out in (whole, run[2]):
        assert "Brainstacks: disk: " in out and "memory of a process in the last round" in out
    assert "Brainstacks: to train: chat, code; at most 32 steps, 4 stacks in the library" in run[2]
    assert "Plan: " in whole and "Plan: " not in run[2]


def test_preprocess_makes_no_library(tiny_llama_dir: Path, tmp_path: Path) -> None:
    loaded(curriculum_config(tiny_llama_dir, tmp_path, ["chat"]), preprocess=True)
    assert not (tmp_path / "out" / "library").exists()


def test_bytes_on_disk_are_exact(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    library = Library.open(run[1] / "out" / "library")
    made = previewed(loaded(three_domains(run, tmp_path)), count_raw=False)
    assert made.sizes is not None
    for stack in library.manifest.stacks:
        assert (library.stack_path(stack.name) / "adapter_model.safetensors").stat().st_size == made.sizes.stack_file
    columns = library.protection("chat")
    held = library.manifest.domain("chat").protection
    assert held is not None and held.columns == max(basis.shape[1] for basis in columns.values())
    assert sum(basis.nbytes for basis in columns.values()) <= made.sizes.null_space(held.columns)


@pytest.mark.parametrize("names", [["a.weight"], ["b", "a", "c.longer_name"], [f"layer.{i}" for i in range(40)]])
def test_the_length_of_a_safetensors_file(names: list[str]) -> None:
    rng = Random(0)
    tensors = {name: torch.zeros(rng.randint(1, 50), rng.randint(1, 50)) for name in names}
    assert safetensors_bytes({name: t.shape for name, t in tensors.items()}) == len(tensors_to_bytes(tensors, "it"))


def test_the_plan_leaves_randomness_as_it_was(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """So that a run learns the same with and without it."""
    training = loaded(three_domains(run, tmp_path))
    before = torch.get_rng_state()
    previewed(training, count_raw=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_of_stacks_is_that_of_real_ones(run: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    training = loaded(three_domains(run, tmp_path))
    plan, cfg = training.plan, training.stages[0].cfg
    sizes = Sizes.of(plan, cfg)
    model = AutoModelForCausalLM.from_pretrained(cfg.base_model, dtype=torch.float32)
    assert sizes.base == sum(parameter.nbytes for parameter in model.parameters())
    config = stack_config(cfg, plan)
    tuner = get_peft_model(model, config).base_model
    assert isinstance(tuner, BrainstacksModel)
    trained = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(t.nbytes for values in optimizer.state.values() for t in values.values() if t.dim())
    assert sizes.trained_stack == sum(2 * parameter.nbytes for parameter in trained) + state
    tuner.attach_stack("s001_chat", "chat", config, tuner.export_stack(ADAPTER_NAME))
    banks = sum(buffer.nbytes for layer in tuner.brainstacks_layers() for buffer in layer.bank.buffers())
    assert sizes.frozen_stack == banks


def test_a_quantised_base_is_as_large_as_bitsandbytes_makes_it(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", hidden=256, heads=8, kv=4)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=torch.bfloat16)
    real = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        # Without the code tables, 1 kB a layer whatever its size.
        real += parameter.nbytes + (state.absmax.nbytes + state.state2.absmax.nbytes if state else 0)
    cfg = DictDefault({"base_model": str(folder), "load_in_4bit": True, "torch_dtype": torch.bfloat16})
    assert base_bytes(meta_model(cfg), cfg) == pytest.approx(real, rel=0.001)


def test_optimiser_state_by_name() -> None:
    known = {"adamw_torch": 8, "paged_adamw_8bit": 2, "lion_8bit": 1, "sgd": 0}
    assert {name: state_bytes(name) for name in known} == known


def domain(name: str, **values: Any) -> DomainPreview:
    return DomainPreview(name, **({"stacks": 2, "rounds": 2, "steps": 10, "kept_rows": 8} | values))


def of(*domains: DomainPreview, **values: Any) -> Preview:
    return Preview(
        list(domains),
        **(
            {"others": 0, "unprotected": 0, "columns": 0, "validation_bytes": 0, "sizes": None, "offloaded": False}
            | values
        ),
    )


def test_a_null_space_with_too_few_rows_is_named() -> None:
    made = of(domain("chat"), domain("code", directions=4, samples=20), domain("math", directions=4, samples=8))
    (note,) = made.notes()
    assert all(part in note for part in ("chat has 8", "20", "val_set_size", "brainstacks.null_space.samples"))


@pytest.mark.parametrize(
    ("directions", "said"), [(40, "find only 38% of its"), (64, "find no direction free, and stop")]
)
def test_a_null_space_that_fills_up_is_named(tiny_llama_dir: Path, tmp_path: Path, directions: int, said: str) -> None:
    """The narrowest projection of the tiny model has 64 outputs."""
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat", "code", "math"])
    config["brainstacks"]["null_space"] = {"directions": directions, "samples": 8, "min_capacity": 0.4}
    notes = list(previewed(loaded(config), count_raw=False).notes())
    (note,) = [note for note in notes if "protect other domains" in note]
    assert f"code may {said}" in note and "64 outputs" in note and "brainstacks.null_space.directions" in note
    config["brainstacks"]["null_space"]["directions"] = 16
    assert list(previewed(loaded(config), count_raw=False).notes()) == []


def test_columns_and_unknown_rl_steps() -> None:
    made = of(
        domain("chat", directions=9), domain("code", directions=4, rl_rounds=("grpo",), rl_steps=(None,)), columns=3
    )
    assert made.all_columns == 3 + 9  # what protects chat, by its own setting; nothing trains after code
    assert "those of RL rounds by epochs" in made.summary()[0] and "40 steps" in made.summary()[0]


def test_every_domain_is_protected_once_another_trains() -> None:
    made = of(
        domain("chat", done=True, protected=True), domain("law", done=True), domain("code", directions=0),
        domain("math", directions=4), domain("taste", directions=5), columns=7, unprotected=1,
    )  # fmt: skip
    assert made.all_columns == 7 + 4 * 3 + 4  # taste protects math, by the setting of math


@pytest.mark.parametrize(
    ("count", "shown"), [(12, "12 bytes"), (1500, "1.5 kB"), (567_000_000, "567 MB"), (11e12, "11,000 GB")]
)
def test_sizes_are_readable(count: int, shown: str) -> None:
    assert size(int(count)) == shown


def test_a_base_without_known_shapes_still_trains(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a model of foreign code, which Transformers has no class for."""
    monkeypatch.setattr("axolotl_brainstacks.curriculum.sizes.MODEL_FOR_CAUSAL_LM_MAPPING", {})
    rows = write_domain(tmp_path / "chat.jsonl", "chat", 12, Random(0))
    config = base_config(
        tiny_llama_dir, tmp_path / "out", adapter="brainstacks", datasets=[chat_dataset(rows)], val_set_size=4,
        brainstacks={"domain": "chat"},
    )  # fmt: skip
    loaded(config)
    out = capsys.readouterr().out
    assert "to train: chat; at most" in out and "disk" not in out
