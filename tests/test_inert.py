"""Installed, but not asked for: other configs train exactly as without us, and nothing heavy of ours is imported."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from support.models import base_config, chat_dataset, run_axolotl, write_rows
from support.seeds import seeded_random

from axolotl_brainstacks.plugin import check_axolotl

# Put on PYTHONPATH as sitecustomize, so that it runs first in every process of a command.
HIDE = """
import importlib.abc, importlib.metadata, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "axolotl_brainstacks":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
found = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **select: importlib.metadata.EntryPoints(
    point for point in found(**select) if not point.value.startswith("axolotl_brainstacks")
)
"""
# At its end, every process of a command appends what it ran, which modules of ours it imported, and whether code of ours
# was on the stack when torch was imported.
REPORT = """
import atexit, importlib.abc, json, sys, traceback

blamed = False

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        global blamed
        if name == "torch":
            blamed = blamed or any("/axolotl_brainstacks/" in frame.filename for frame in traceback.extract_stack())

sys.meta_path.insert(0, Watch())

@atexit.register
def report():
    names = [name for name in sys.modules if name.partition(".")[0] == "axolotl_brainstacks"]
    with open({path!r}, "a") as file:
        print(json.dumps([sys.argv[0], names, blamed]), file=file)
"""
# The plugin and the shape of its settings, the adapter that PEFT gets to know, and what that computes with.
SETTINGS = {"args", "router_args", "config_errors", "names"}
LIGHT = {"plugin", *SETTINGS, "adapter", "distributed", "guarded"}


def spied(folder: Path, prologue: str = "") -> dict[str, str]:
    """Environment under which commands report their imports into `folder/modules.jsonl`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(prologue + REPORT.format(path=str(folder / "modules.jsonl")))
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def reported(folder: Path, program: str) -> tuple[set[str], bool]:
    """Of `program` and workers that it started: the modules of ours they imported; whether we made one import torch."""
    lines = [json.loads(line) for line in (folder / "modules.jsonl").read_text().splitlines()]
    own = [(modules, blamed) for argument, modules, blamed in lines if argument.endswith(program)]
    assert own, lines
    return {module for modules, _ in own for module in modules}, any(blamed for _, blamed in own)


def test_plain_lora_trains_as_without_us(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24, seeded_random())

    def run(name: str, prologue: str) -> tuple[list[float], bytes, tuple[set[str], bool]]:
        folder = tmp_path / name
        environment = spied(folder, prologue)
        config = base_config(
            tiny_llama_dir, folder / "out", adapter="lora", datasets=[chat_dataset(rows)], max_steps=5, lora_dropout=0.1,
            save_strategy="steps", save_steps=5, val_set_size=0.2, eval_steps=2,
        )  # fmt: skip
        (folder / "lora.yml").write_text(yaml.safe_dump(config))
        run_axolotl(["train", folder / "lora.yml", "--launcher", "python"], folder, environment)
        history = json.loads((folder / "out/checkpoint-5/trainer_state.json").read_text())["log_history"]
        losses = [entry[key] for entry in history for key in ("loss", "eval_loss", "grad_norm") if key in entry]
        return losses, (folder / "out/adapter_model.safetensors").read_bytes(), reported(folder, "/axolotl")

    with ThreadPoolExecutor() as pool:
        (losses, weights, imported), (losses_without, weights_without, imported_without) = pool.map(
            run, ("with", "without"), ("", HIDE)
        )
    assert len(losses) >= 12 and losses == losses_without
    assert weights == weights_without
    assert imported_without == (set(), False)
    parts = {name.split(".")[1] for name in imported[0] if "." in name}
    assert "plugin" in parts and parts <= LIGHT


def test_help_lists_our_commands_and_stays_light(tmp_path: Path) -> None:
    environment = spied(tmp_path / "spy")
    text = run_axolotl(["--help"], tmp_path, environment)
    points = {point.name for point in entry_points(group="axolotl.cli_commands", module="axolotl_brainstacks.cli")}
    assert "brainstacks-library" in points
    for name in points:
        assert f"  {name} " in text
    assert reported(tmp_path / "spy", "/axolotl") == (
        {"axolotl_brainstacks", "axolotl_brainstacks.cli", "axolotl_brainstacks.guarded"},
        False,
    )


@pytest.mark.parametrize("release", ["0.20.3", "0.22.0", "1.0", "0.9.1.dev0"])
def test_another_axolotl_is_named_with_the_one_to_install(release: str) -> None:
    check_axolotl("0.21.0")
    check_axolotl("0.21.1.dev0")
    with pytest.raises(ValueError, match=rf"Axolotl {release} is installed.*pip install .axolotl>=0\.21,<0\.22"):
        check_axolotl(release)
