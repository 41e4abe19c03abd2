"""Runs every benchmark, one after another, and prints one table. Run it alone on the machine: times are measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from measure import folder, show

SCRIPTS = (
    "train_step",
    "frozen_stacks",
    "memory",
    "null_space",
    "discovery",
    "residency",
    "decode",
    "extrapolate",
)


def run_all(short: bool) -> None:
    here, start = Path(__file__).parent, time.perf_counter()
    for script in SCRIPTS:
        print(f"python benchmarks/{script}.py{' --short' if short else ''}", flush=True)
        subprocess.run([sys.executable, here / f"{script}.py", *["--short"] * short], check=True)
    show([json.loads((folder(short) / f"{script}.json").read_text()) for script in SCRIPTS])
    print("Forward of a library in PEFT vs in our trainer, max abs diff 0: tests/test_curriculum.py shows it.")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="fewer sizes and repeats, less than 15 minutes on two cores"
    )
    run_all(parser.parse_args().short)
