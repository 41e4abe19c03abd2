"""Which part of the package may know which: read from the import statements, those inside functions included."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "axolotl_brainstacks"
NAME = PACKAGE.name
# What each folder may import of the others, besides the ground floor. Nothing imports what stands above it.
GROUND = {"names", "guarded", "distributed", "evaluation", "args", "router_args", "config_errors"}
MAY_IMPORT = {
    "adapter": set(),
    "library": {"adapter"},
    "router": {"adapter", "library"},
    "serving": {"adapter", "library", "router"},
    "rewards": set(),
    "curriculum": {"adapter", "library", "serving", "calibration"},
    "router_training": {"adapter", "library", "router", "serving", "curriculum", "plugin"},
}
# What training needs and answering must not.
TRAINING = ("axolotl", "bitsandbytes", "datasets", "deepspeed", "trl")


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, at whatever place in the file."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    graph[name].add(full if full in known else node.module)
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
    return graph


def room(module: str) -> str:
    return module.removeprefix(f"{NAME}.").split(".")[0]


def test_no_two_modules_import_each_other_not_even_through_others() -> None:
    graph = imports()
    assert len(graph) > 80
    # The package's own file hands over to the plugin and to the registration, and everything imports it.
    graph.pop(NAME)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_knows_only_what_stands_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | GROUND | {folder}
    wrong = {
        f"{module} imports {target}"
        for module, targets in imports().items()
        if room(module) == folder
        for target in targets
        if room(target) not in allowed
    }
    assert not wrong, sorted(wrong)


def test_answering_needs_nothing_that_trains(tmp_path: Path) -> None:
    """In an environment that has everything installed here but for what training needs."""
    installed = Path(torch.__file__).parents[1]
    for entry in installed.iterdir():
        if entry.name.replace("-", "_").split("_")[0].split(".")[0] not in TRAINING:
            (tmp_path / entry.name).symlink_to(entry)
    script = f"""
import importlib.util
assert not any(importlib.util.find_spec(name) for name in {TRAINING!r})
import axolotl_brainstacks.cli, axolotl_brainstacks.library.joining, axolotl_brainstacks.library.lora_import
import axolotl_brainstacks.library.report, axolotl_brainstacks.serving.model, axolotl_brainstacks.calibration
from peft import PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_TUNER_MAPPING["BRAINSTACKS"].generate is axolotl_brainstacks.serving.model.BrainstacksModel.generate
"""
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE.parent}:{tmp_path}"}
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
