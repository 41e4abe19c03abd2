"""Which part of the package may know which: read from the import statements, those inside functions included."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "axolotl_brainstacks"
NAME = PACKAGE.name
# Every folder and every file beside them is a part. What each may import of the others, besides the ground floor, which
# imports nothing of the package.
GROUND: set[str] = {"names", "guarded", "distributed"}
MAY_IMPORT: dict[str, set[str]] = {
    NAME: {"adapter", "serving", "rewards", "plugin"},  # its own __init__.py
    "adapter": set(),
    "evaluation": set(),
    "calibration": {"adapter", "evaluation"},
    "library": {"adapter"},
    "config_errors": set(),
    "router_args": set(),
    "args": {"config_errors", "router_args"},
    "router": {"adapter", "library", "evaluation", "router_args"},
    "serving": {"adapter", "library", "router", "evaluation"},
    "rewards": set(),
    "turns": set(),
    "errors": set(),
    "curriculum": {
        *("adapter", "library", "serving", "evaluation", "calibration", "args", "router_args", "config_errors"),
    },
    "plugin": {"curriculum", "errors"},
    "router_training": {
        *("adapter", "library", "router", "serving", "evaluation", "args", "router_args", "curriculum", "plugin"),
    },
    "cli": {"library", "router_training"},
}
# What training needs and answering must not.
TRAINING = ("axolotl", "bitsandbytes", "datasets", "deepspeed", "trl")
# The parts that may import some of these, inside functions too. All others work where none is installed.
MAY_TRAIN = {
    "curriculum": {*TRAINING},
    "router_training": {*TRAINING},
    "plugin": {"axolotl"},
    "turns": {"axolotl", "datasets"},
    "cli": {"axolotl"},  # for the command of a launcher
    "distributed": {"deepspeed"},  # only where ZeRO-3 has sharded the parameters
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def import_statements() -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Module and statement of every import, at whatever place in the file."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield name, node


def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, node in import_statements():
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                graph[name].add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            graph[name] |= {alias.name for alias in node.names if alias.name in known}
    return graph


def part(module: str) -> str:
    return module.removeprefix(f"{NAME}.").split(".")[0]


def test_imports_are_absolute() -> None:
    """The other tests read the names of modules from the statements."""
    relative = {name for name, node in import_statements() if isinstance(node, ast.ImportFrom) and node.level}
    assert not relative, sorted(relative)


def test_no_two_modules_import_each_other_not_even_through_others() -> None:
    graph = imports()
    assert len(graph) > 80
    # The package's own file hands over to the plugin and to the registration, and everything imports it.
    graph.pop(NAME)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_part_has_its_rule() -> None:
    assert {part(module) for module in modules()} == GROUND | MAY_IMPORT.keys()


def test_a_part_knows_only_what_stands_below_it() -> None:
    allowed = {name: below | GROUND | {name} for name, below in MAY_IMPORT.items()}
    wrong = {
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if part(target) not in allowed.get(part(module), set())
    }
    assert not wrong, sorted(wrong)


def test_only_training_imports_what_training_needs() -> None:
    wrong = set()
    for module, node in import_statements():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        foreign = {name.split(".")[0] for name in names} & {*TRAINING}
        wrong |= {f"{module} imports {name}" for name in foreign - MAY_TRAIN.get(part(module), set())}
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
