"""Attacks on tiny libraries, by the thousand, as a table; and what opening and verifying a library of many stacks takes.

python benchmarks/attack.py --count 300 --seed 7     # variants of each kind
python benchmarks/attack.py --flips --count 5        # so many flipped bits in each file of a library: who notices
python benchmarks/attack.py --stacks 500 1000        # libraries of so many tiny stacks
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
# As in the tests: no network, and no process of its own for every small file of data.
os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_TEE_STDOUT": "0",
    "AXOLOTL_DATASET_NUM_PROC": "0",
}

OUTCOMES = {
    "refused": "refused cleanly",
    "harmless": "harmless or correct",
    "wrong": "accepted wrongly",
    "crash": "unclear crash",
    "hang": "hang",
}


def attack(count: int, seed: int) -> bool:
    """Print the table, and each variant that was neither refused nor harmless. Whether there was none."""
    from support import fuzzed_answers, fuzzed_files, fuzzing

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    clean = True
    print(f"| group | tried | {' | '.join(OUTCOMES.values())} |\n|{' --- |' * (len(OUTCOMES) + 2)}")
    for group, attacked in (fuzzed_files.ATTACKS | fuzzed_answers.ATTACKS).items():
        trials = list(fuzzing.trials(group, attacked, count, seed))
        counts = Counter(trial.outcome for trial in trials)
        print(f"| {group} | {count} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |", flush=True)
        for trial in trials:
            if trial.outcome not in ("refused", "harmless"):
                clean = False
                print(f"{trial.outcome}: {trial.what}", file=sys.stderr)
    return clean


_MEASURE = """
import os, sys, time
from pathlib import Path
from axolotl_brainstacks.library import Library
memory = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
def least(action):
    times = []
    for _ in range(5):
        start = time.process_time()
        result = action()
        times.append(time.process_time() - start)
    return min(times), result
before = memory()
opened, library = least(lambda: Library.open(sys.argv[1]))
verified, problems = least(library.verify)
assert problems == [], problems
size = (library.path / "manifest.json").stat().st_size / 1e6
print(f"| {len(library.manifest.stacks)} | {size:.2f} | {opened:.3f} | {verified:.3f} | {memory() - before:.0f} |")
"""


def scale(sizes: Sequence[int]) -> None:
    """Print seconds of CPU time, the least of five, and MB of memory, each size in a process of its own."""
    print("| stacks | manifest, MB | open, s | verify, s | memory, MB |\n| --- | --- | --- | --- | --- |")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "library", size)
            subprocess.run([sys.executable, "-c", _MEASURE, str(Path(folder) / "library")], check=True)


def make(path: Path, stacks: int) -> None:
    """A library of tiny stacks. Its files are written one by one and listed at once: thousands of changes would take long."""
    from support.random_library import CONFIG, a_round, new_library, some_tensors

    from axolotl_brainstacks.library.entries import CONFIG as CONFIG_FILE
    from axolotl_brainstacks.library.entries import WEIGHTS, DomainEntry, StackEntry
    from axolotl_brainstacks.library.manifest import Manifest
    from axolotl_brainstacks.library.storage import json_to_bytes, record_of, tensors_to_bytes

    library = new_library(path)
    manifest = Manifest(base=library.manifest.base, next_stack=stacks + 1)
    for number in range(1, stacks + 1):
        domain = f"domain{(number - 1) // 2}"
        name = f"s{number:03d}_{domain}"
        data = {CONFIG_FILE: json_to_bytes(CONFIG), WEIGHTS: tensors_to_bytes(some_tensors(), "a stack")}
        (path / "stacks" / name).mkdir(parents=True)
        for file, content in data.items():
            (path / "stacks" / name / file).write_bytes(content)
        files = {file: record_of(content) for file, content in data.items()}
        manifest.stacks.append(StackEntry(name=name, domain=domain, round=2 - number % 2, files=files))
        if number % 2:
            rows = f"rows of {domain}".encode()
            (path / "validation").mkdir(exist_ok=True)
            (path / f"validation/{domain}.safetensors").write_bytes(rows)
            manifest.domains.append(DomainEntry(name=domain, base_loss=2.5, validation=record_of(rows), done=True))
        entry = manifest.domains[-1]
        entry.rounds.append(a_round(2 - number % 2).model_copy(update={"stack": name}))
        entry.context.append(name)
    with library._lock.hold():  # `writing` would move aside what is not listed yet
        library._commit(manifest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="variants of each kind")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what all variants follow from")
    parser.add_argument("--stacks", type=int, nargs="+", help="measure libraries of so many stacks instead")
    parser.add_argument("--flips", action="store_true", help="flip `count` bits in every file instead")
    given = parser.parse_args()
    if given.stacks:
        scale(given.stacks)
    elif given.flips:
        from flips import flips

        print(f"seed {given.seed}", flush=True)
        flips(given.count, given.seed)
    else:
        print(f"seed {given.seed}")
        sys.exit(0 if attack(given.count, given.seed) else 1)
