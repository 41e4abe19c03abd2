"""Runs PEFT's own tests on our tuner and prints a table: python tests/peft_suite/run.py [FILE ...]

The tests are those of the installed PEFT's source distribution, which pip fetches from the package index. Exit status 1 if a
test fails in a way that `declared.py` does not name, or if something named there did not happen in a run of all files.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from peft_suite import declared, hub, rows  # noqa: E402

CACHE = HERE.parents[1] / ".cache" / "peft_suite"
# What PEFT's tests import besides what we have; without their requirements, as Stable Diffusion is not run.
PACKAGES = ("parameterized", "diffusers", "importlib_metadata", "zipp")
FILES = {*rows.TABLES, *rows.STAND_IN}
# "no file": of the Hub. "not reached": failed before there was a config of ours. "skipped": by PEFT, or about LoRA alone.
COLUMNS = ("passed", "failed", "refused", "assumption", "no file", "not reached", "skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"some of {', '.join(sorted(FILES))}; default: all")
    parser.add_argument("-k", metavar="EXPRESSION", help="pytest's -k")
    arguments = parser.parse_args()
    if unknown := set(arguments.files) - set(FILES):
        parser.error(f"no rows for {', '.join(sorted(unknown))}; there are some for {', '.join(sorted(FILES))}")
    suite = prepare(CACHE / f"peft-{version('peft')}")
    hub.fill(CACHE / "hub")
    files = arguments.files or sorted(FILES)
    results = {}
    for file in files:
        print(f"{file} ...", file=sys.stderr, flush=True)
        results[file] = run(suite, file, arguments.k)
    bad = report(results)
    if not arguments.files and not arguments.k:
        bad += stale(results)
    return 1 if bad else 0


def prepare(suite: Path) -> Path:
    """PEFT's tests in a folder of their own, with our rows."""
    archive = suite.with_name(f"{suite.name}.tar.gz")
    if not archive.is_file():
        options = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation")
        pip("download", "--quiet", *options, "--dest", str(archive.parent), f"peft=={version('peft')}")
    packages = CACHE / "packages"
    if not packages.is_dir():
        pip("install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES)
    with tarfile.open(archive) as tar:
        tar.extractall(suite.parent, [m for m in tar if m.name.startswith(f"{suite.name}/tests/")], filter="data")
    (suite / "tests" / "__init__.py").touch()
    (suite / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  single_gpu_tests\n  multi_gpu_tests\n  bitsandbytes\n  regression\n"
    )
    for file, tables in rows.TABLES.items():
        insert_rows(suite / "tests" / file, tables)
    for file in rows.STAND_IN:
        insert_stand_in(suite / "tests" / file)
    return suite


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def insert_rows(path: Path, tables: dict[str, str]) -> None:
    """Put our rows in the place of the tables' own, right behind these."""
    lines, missing = path.read_text().splitlines(), set(tables)
    for node in reversed(ast.parse("\n".join(lines)).body):
        if isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name) and name.id in tables:
            assert node.end_lineno is not None
            lines.insert(node.end_lineno, f"from peft_suite.rows import {tables[name.id]} as {name.id}")
            missing.discard(name.id)
    if missing:
        raise SystemExit(
            f"{path.name} of PEFT {version('peft')} has no {', '.join(sorted(missing))}: fix TABLES in rows.py"
        )
    path.write_text("\n".join(lines) + "\n")


def insert_stand_in(path: Path) -> None:
    """Let LoRA's names mean ours, from the end of the imports on."""
    lines = path.read_text().splitlines()
    imports = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports[-1].end_lineno is not None
    lines[imports[-1].end_lineno : imports[-1].end_lineno] = [
        "from peft_suite.rows import LoraStandIn as LoraConfig",
        "from axolotl_brainstacks.adapter import BrainstacksLinear as LoraLayer",
        "from axolotl_brainstacks.serving.model import BrainstacksModel as LoraModel",
    ]
    text = "\n".join(lines) + "\n"
    for theirs, ours in (rows.TRANSLATIONS | rows.ALSO.get(path.name, {})).items():
        text = text.replace(theirs, ours)
    path.write_text(text)


def run(suite: Path, file: str, expression: str | None) -> list[dict[str, str]]:
    """The end of each test of `file` that concerns us."""
    written = suite / f"{file}.jsonl"
    written.unlink(missing_ok=True)
    here, packages = (str(folder) for folder in (HERE.parent, CACHE / "packages"))
    paths = [str(suite), str(HERE.parents[1]), here, packages, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PEFT_SUITE_RESULTS": str(written),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # else test_torch_compile.py skips itself
    }
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-p", "peft_suite.plugin", "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "--tb=short", "--disable-warnings", *(["-k", expression] if expression else [])]
    with (suite / f"{file}.log").open("w") as log:
        status = subprocess.run(command, cwd=suite, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if status not in (0, 1):
        tail = (suite / f"{file}.log").read_text()[-3000:]
        raise SystemExit(f"pytest ended with status {status} on {file}:\n{tail}")
    entries = [json.loads(line) for line in written.read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] != "not ours"]


def report(results: dict[str, list[dict[str, str]]]) -> int:
    """Print the table and what it counts; returns how many failed."""
    print(f"| {'file':34} | " + " | ".join(COLUMNS) + " |")
    print(f"| {'-' * 34} |" + "".join(f" {'-' * len(column)} |" for column in COLUMNS))
    total: Counter[str] = Counter()
    for file, entries in results.items():
        counts = Counter(entry["kind"] for entry in entries)
        total += counts
        _print_row(file, counts)
    _print_row(f"all, PEFT {version('peft')}", total)
    everything = [entry for entries in results.values() for entry in entries]
    for kind, title in (("refused", "Refused on purpose"), ("assumption", "Holds for LoRA alone")):
        reasons = Counter(entry["why"] for entry in everything if entry["kind"] == kind)
        print(
            f"\n{title}:" if reasons else "", *(f"{count:5}  {why}" for why, count in reasons.most_common()), sep="\n"
        )
    failed = [entry for entry in everything if entry["kind"] == "failed"]
    print("\nFailed:" if failed else "")
    for entry in failed:
        print(f"{entry['test']}\n    {entry['why'][:500]}")
    return len(failed)


def _print_row(title: str, counts: Counter[str]) -> None:
    print(f"| {title:34} | " + " | ".join(f"{counts[column]:{len(column)}}" for column in COLUMNS) + " |")


def stale(results: dict[str, list[dict[str, str]]]) -> int:
    """Print what is declared but did not happen; returns how many."""
    seen = {entry["why"] for entries in results.values() for entry in entries}
    unseen = [each.reason for each in (*declared.REFUSALS, *declared.ASSUMPTIONS) if each.reason not in seen]
    for reason in unseen:
        print(f"Declared, but no test met it: {reason}")
    return len(unseen)


if __name__ == "__main__":
    sys.exit(main())
