"""What holds the rows that miss their target on SmolLM2-135M: where the extra time over the peer goes.

`between operations` is wall time that no operation accounts for: Python, autograd, and modules being called.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from libraries import load, new_library
from measure import ON_GPU, Comparison, Result, compare, counted, main, synchronise
from models import SMOLLM2_SIZES, random_ids, smollm2, training_step, tuner_of, with_lora, with_stacks
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

FROZEN, DOMAINS, ROUNDS, PROMPT = 9, ["chat", "code"], 2, 64
TURNS = 7
PRODUCTS = {"mm", "addmm", "bmm", "mv", "addmv"}
GATES = {"topk", "_softmax", "scatter_", "zeros_like", "zero_", "fill_"}
KINDS = PRODUCT, GATE, OTHER, BETWEEN = "matrix products", "top-k and softmax", "other operations", "between operations"


def run(short: bool) -> Result:
    base = smollm2()
    lora, rows, figures = training_step(with_lora(base)), [], {}
    for what, frozen in (("first stack", 0), (f"{FROZEN} frozen stacks", FROZEN)):
        steps = {"theirs": lora, "ours": training_step(with_stacks(base, frozen))}
        found, figures[what] = spots(f"train step, {what}", "PEFT LoRA r=64", steps)
        rows += found
    del lora, steps
    with TemporaryDirectory() as path:
        model = load(new_library(Path(path) / "library", base.eval(), DOMAINS, ROUNDS), base)
        tuner_of(model).use_stacks(None, torch.full((1, len(DOMAINS) * ROUNDS), 0.9))
        tokens = {"theirs": next_token(base), "ours": next_token(model)}
        what = f"decode, a token, {len(DOMAINS)} domains x {ROUNDS} stacks"
        token, token_figures = spots(what, "base model without PEFT", tokens)
    return Result([*rows, *token], SMOLLM2_SIZES | {"prompt": PROMPT}, figures | {"token": token_figures})


def next_token(model: nn.Module) -> Callable[[], None]:
    """The forward of one more token of an answer."""
    cache, ids = DynamicCache(), random_ids(model, 1, PROMPT)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return forward


def spots(
    what: str, peer: str, runs: Mapping[str, Callable[[], None]]
) -> tuple[list[Comparison], dict[str, dict[str, float]]]:
    """Each kind of operation's share of the extra time, and the seconds by kind; medians of runs taken in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(TURNS):
        for name, run in runs.items():
            found[name].append(by_kind(run))
    kinds = {name: {kind: median(each[kind] for each in every) for kind in KINDS} for name, every in found.items()}
    totals = {name: [sum(each.values()) for each in every] for name, every in found.items()}
    extra = median(totals["ours"]) - median(totals["theirs"])
    shares = [
        counted(f"{what}: {kind}", "the extra time", kinds["ours"][kind] - kinds["theirs"][kind], extra, "s")
        for kind in KINDS
    ]
    return [compare(f"{what}, profiled", peer, totals["ours"], totals["theirs"]), *shares], kinds


def by_kind(run: Callable[[], None]) -> dict[str, float]:
    """Seconds of one run by kind of operation, the profiler's own time included."""
    found = dict.fromkeys(KINDS, 0.0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ON_GPU]) as profiler:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        seconds = time.perf_counter() - start
    for event in profiler.key_averages():
        space, _, name = event.key.partition("::")
        if space == "aten" and event.device_type == DeviceType.CPU:  # kernels count with the operation that starts them
            kind = PRODUCT if name in PRODUCTS else GATE if name in GATES else OTHER
            found[kind] += (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1e6
    return found | {BETWEEN: seconds - sum(found.values())}


if __name__ == "__main__":
    main(run)
