"""How every benchmark measures: ours and its peers in turn, medians and quartiles, one table and one JSON file."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
PACKAGES = ("axolotl-brainstacks", "axolotl", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    ratio: median of ours / theirs over the repeats; low, high: its quartiles. ours, theirs: medians, in `unit`.
    reach: the largest ratio that will do; None for a row that is there to be known.
    """

    what: str
    against: str
    ratio: float
    low: float
    high: float
    ours: float
    theirs: float
    unit: str
    reach: float | None = None

    @property
    def verdict(self) -> str:
        if self.reach is None:
            return ""
        return "reached" if self.ratio <= self.reach else "missed"


@dataclass
class Result:
    """What a benchmark found. sizes: what it ran on. figures: everything measured besides the comparisons."""

    comparisons: list[Comparison]
    sizes: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)


def compare(
    what: str, against: str, ours: Sequence[float], theirs: Sequence[float], unit: str = "s", reach: float | None = None
) -> Comparison:
    """Pairs of repeats that ran next to each other: what slowed both down cancels out."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Comparison(what, against, ratio, low, high, statistics.median(ours), statistics.median(theirs), unit, reach)


def counted(what: str, against: str, ours: float, theirs: float, unit: str, reach: float | None = None) -> Comparison:
    """A comparison of figures that have no spread."""
    return compare(what, against, [ours], [theirs], unit, reach)


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    prepare: Callable[[str], object] = lambda name: None,
    warm_ups: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every run, taken in turn, A B C A B C; `prepare` of a run's name comes before it, untimed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.freeze()  # collections look only at what the runs make
    for turn in range(warm_ups + repeats):
        for name, run in runs.items():
            prepare(name)
            seconds = _seconds(run)
            if turn >= warm_ups:
                times[name].append(seconds)
    return times


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def repeats(short: bool) -> int:
    return 7 if short else 15


def autocast() -> AbstractContextManager[Any]:
    """bf16 on a GPU, as Axolotl trains there; plain fp32 on a CPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU)


# Memory


def memory() -> int:
    """Bytes in use now: of tensors on the GPU, or of this process."""
    return torch.cuda.memory_allocated() if ON_GPU else _status("VmRSS")


def peak_memory(run: Callable[[], object]) -> int:
    """The largest `memory()` while `run` runs. On a CPU it is exact only `in_fresh_process`."""
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return torch.cuda.max_memory_allocated() if ON_GPU else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def in_fresh_process[T](function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in a process of its own, whose freed tensors leave its memory at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# Results


def main(run: Callable[[bool], Result]) -> None:
    """The command line of a benchmark: run it, print its table, write its JSON."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--short", action="store_true", help="fewer sizes and repeats; results are not kept in git")
    short = parser.parse_args().short
    name = Path(sys.argv[0]).stem
    torch.manual_seed(0)
    load_before, start = os.getloadavg()[0], time.perf_counter()
    result = run(short)
    content = {
        "benchmark": name,
        "short": short,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment() | {"load_before": load_before},
        "sizes": result.sizes,
        "comparisons": [asdict(row) | {"verdict": row.verdict} for row in result.comparisons],
        "figures": result.figures,
    }
    file = folder(short) / f"{name}.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    show([content])


def folder(short: bool) -> Path:
    path = RESULTS / "short" if short else RESULTS
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "setting": "bf16 autocast, NF4 base, gradient checkpointing" if ON_GPU else "fp32",
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
    } | {package: version(package) for package in PACKAGES}


def show(contents: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of one or many results."""
    env = contents[0]["environment"]
    versions = ", ".join(f"{package} {env[package]}" for package in PACKAGES)
    table = Table(
        title=f"{env['device']}, {env['threads']} threads, {env['setting']}",
        caption=f"commit {env['commit']}; {versions}",
        show_lines=True,
    )
    for title in ("what", "against", "reach", "ratio", "quartiles", "ours", "theirs", "verdict"):
        table.add_column(title, justify="left" if title in ("what", "against", "verdict") else "right")
    for content in contents:
        for row in content["comparisons"]:
            table.add_row(
                row["what"],
                row["against"],
                "" if row["reach"] is None else f"{row['reach']:.3g}",
                f"{row['ratio']:.3g}",
                "" if row["low"] == row["high"] else f"{row['low']:.3g} to {row['high']:.3g}",
                quantity(row["ours"], row["unit"]),
                quantity(row["theirs"], row["unit"]),
                {"missed": "[red]missed", "reached": "[green]reached"}.get(row["verdict"], ""),
            )
    # Wide enough for its columns also when it goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)


def quantity(value: float, unit: str) -> str:
    """A value in a unit that a reader likes: 0.0123 s -> 12.3 ms."""
    steps = {"s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)), "B": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))}
    for name, size in steps.get(unit, ()):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.4g} {unit}"
