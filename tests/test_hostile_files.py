"""Files that block, have no end, fill the memory or are pickles: refused by name before PEFT or this package reads them."""

import copy
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.answering import base as base
from support.hostile import change_manifest
from support.library_files import run
from support.routed import new_library, tiny_base, tuner_of
from support.wrapped import revive
from transformers import LlamaForCausalLM

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import CONFIG, WEIGHTS
from axolotl_brainstacks.library.storage import MAX_TEXT_BYTES, problem_of, read_checked, record_of

# A call that waits inside PEFT's own reader of safetensors answers no signal, so the clock ends the process.
pytestmark = pytest.mark.timeout(120, method="thread")

PICKLE = "adapter_model.bin"
STACK = "stacks/s001_chat"
EMPTY = {"sha256": "0" * 64, "bytes": 0}
# Regular for `stat`, of 0 bytes, and without end for whoever reads it.
ENDLESS = Path("/proc/self/pagemap")
# Takes exponential time on every name of a module.
SLOW = "(([a-z0-9_.]+)+)+!"


@pytest.fixture(scope="module")
def original(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    return new_library(tmp_path_factory.mktemp("hostile") / "library", base, ["chat"]).path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path / "library"))


Load = Callable[[Path], PeftModel]


@pytest.fixture
def load(base: LlamaForCausalLM) -> Load:
    return lambda path: PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()


def set_keys(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def sparse(path: Path, size: int) -> dict[str, Any]:
    """Put a file of `size` zeros that takes no room there; its record, with a hash that is not its own."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)
    return {"sha256": "0" * 64, "bytes": size}


# What PEFT reads


@pytest.mark.parametrize("place", ["", STACK])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "link to a fifo"])
def test_weights_that_are_no_regular_file(path: Path, load: Load, place: str, kind: str) -> None:
    weights = path / place / WEIGHTS
    weights.unlink()
    change_manifest(path, lambda manifest: manifest.update(root={}))
    match kind:
        case "fifo":
            os.mkfifo(weights)
        case "folder":
            weights.mkdir()
        case "dangling link":
            weights.symlink_to(path / "nothing")
        case _:
            os.mkfifo(path.parent / "fifo")
            weights.symlink_to(path.parent / "fifo")
    with pytest.raises(ValueError, match=rf"{weights} is no regular file.*restore"):
        load(path / place)


@pytest.mark.parametrize("place", ["", STACK])
@pytest.mark.parametrize("kind", ["good", "evil", "fifo"])
def test_pickles_are_refused(path: Path, load: Load, place: str, kind: str) -> None:
    """PEFT reads one where there are no safetensors."""
    change_manifest(path, lambda manifest: manifest.update(root={}))
    tensors, picked = load_file(path / place / WEIGHTS), path / place / PICKLE
    (path / place / WEIGHTS).unlink()
    match kind:
        case "good":
            torch.save(tensors, picked)
        case "evil":
            picked.write_bytes(pickle.dumps(os.getcwd))
        case _:
            os.mkfifo(picked)
    with pytest.raises(ValueError, match=rf"{picked} is a pickle.*{WEIGHTS}"):
        load(path / place)


def test_a_pickle_beside_safetensors_is_not_read(path: Path, load: Load) -> None:
    (path / PICKLE).write_bytes(pickle.dumps(os.getcwd))
    assert load(path).base_model.stacks


# Regular expressions


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"layers_pattern": SLOW, "layers_to_transform": [0]},
        {"layers_pattern": ["layers", SLOW], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_a_strangers_expressions_are_not_matched(path: Path, load: Load, changes: dict[str, Any]) -> None:
    stack = path / STACK
    modules = sorted({key.split(".brainstacks_")[0] for key in load_file(stack / WEIGHTS)})
    set_keys(stack, **changes)
    model = load(stack)
    wrapped = [f"base_model.model.{layer.module_name}" for layer in tuner_of(model).brainstacks_layers()]
    assert sorted(wrapped) == modules
    (stack / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=rf"`{next(iter(changes))}`.*regular expression.*list names"):
        BrainstacksConfig.from_pretrained(str(stack))


def test_modules_to_save_are_names(path: Path, load: Load) -> None:
    set_keys(path / STACK, modules_to_save=[SLOW])
    with pytest.raises(ValueError, match=r"`modules_to_save`.*name the modules"):
        load(path / STACK)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(q|down)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "l[a-y]+s"},
    ],
    ids=str,
)
def test_an_adapter_of_ones_own_expressions_is_saved_and_loaded(
    base: LlamaForCausalLM, tmp_path: Path, settings: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    config = BrainstacksConfig(task_type="CAUSAL_LM", r=2, num_experts=2, **settings)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    revive(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert not torch.equal(base(input_ids=ids).logits, expected), "the stack does something"
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "saved" / WEIGHTS).keys()


# Files without end, and files that would fill the memory


def test_a_file_without_end_is_read_no_further_than_it_says(tmp_path: Path) -> None:
    link = tmp_path / "file.safetensors"
    link.symlink_to(ENDLESS)
    record = record_of(b"")
    for problem in (problem_of(link, record), problem_of(link, record.model_copy(update={"sha256": "0" * 64}))):
        assert problem and str(link) in problem and "altered" in problem
    with pytest.raises(ValueError, match=rf"{link} does not have the 0 bytes that it says.*put"):
        read_checked(link, record)


def test_commands_and_loads_end_with_a_file_without_end(path: Path, load: Load) -> None:
    rows, weights, config = path / "validation/chat.safetensors", path / WEIGHTS, path / STACK / CONFIG
    for file in (rows, weights, config):
        file.unlink()
        file.symlink_to(ENDLESS)

    def list_as_empty(manifest: dict[str, Any]) -> None:
        manifest["domains"][0]["validation"] = manifest["root"][WEIGHTS] = EMPTY
        manifest["stacks"][0]["files"][CONFIG] = EMPTY

    change_manifest(path, list_as_empty)
    output = run(Library.open(path), "verify").output
    assert all(f"{file} is altered" in output for file in (rows, weights, config))
    with pytest.raises(ValueError, match=rf"{weights} is altered"):
        load(path)
    with pytest.raises(ValueError, match=rf"{config} does not have the 0 bytes"):
        Library.open(path).stack_config("s001_chat")


def test_a_sparse_config_is_refused_before_it_is_read(path: Path, load: Load) -> None:
    config = path / STACK / CONFIG
    record = sparse(config, 2**40)
    change_manifest(path, lambda manifest: manifest["stacks"][0]["files"].update({CONFIG: record}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"{config} is larger than the 67108864 bytes.*restore"):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "in KiB"


@pytest.mark.parametrize("file", ["router/discovery/chat.jsonl", "report/samples.jsonl", "report/router.png"])
def test_a_sparse_record_is_refused_before_it_is_read(path: Path, file: str) -> None:
    library = Library.open(path)
    with library.writing():
        library.write_file(file, b"x")
    record = sparse(path / file, MAX_TEXT_BYTES + 1)
    change_manifest(path, lambda manifest: manifest["records"].update({file: record}))
    with pytest.raises(ValueError, match=rf"{path / file} is larger than the {MAX_TEXT_BYTES} bytes"):
        Library.open(path).read_file(file)


def test_a_file_whose_hash_is_right_is_read_whole(tmp_path: Path) -> None:
    torch.manual_seed(4)
    data = bytes(torch.randint(256, (3 * 2**20 + 5,), dtype=torch.uint8).tolist())
    for size in (0, 1, 2**20 - 1, 2**20, 2**20 + 1, len(data)):
        (tmp_path / "file.bin").write_bytes(data[:size])
        record = record_of(data[:size])
        assert problem_of(tmp_path / "file.bin", record) is None
        assert read_checked(tmp_path / "file.bin", record) == data[:size]


# A pin


def test_a_pin_lets_no_stack_in_that_no_manifest_lists(
    path: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = Path(shutil.copytree(path / STACK, tmp_path / "swapped"))
    for pin in (Library.open(path).sha256, "0" * 64):
        monkeypatch.setenv("BRAINSTACKS_LIBRARY_SHA256", pin)
        for folder in (swapped, path / STACK):
            with pytest.raises(ValueError, match=rf"BRAINSTACKS_LIBRARY_SHA256 is set.*{folder}.*load the library"):
                load(folder)
    monkeypatch.setenv("BRAINSTACKS_LIBRARY_SHA256", Library.open(path, "").sha256)
    assert load(path).base_model.stacks
    get_peft_model(tiny_base(), BrainstacksConfig(task_type="CAUSAL_LM"))
    monkeypatch.delenv("BRAINSTACKS_LIBRARY_SHA256")
    load(swapped)
