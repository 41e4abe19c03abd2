"""Forwards that router discovery takes, against the published loop, which runs a whole batch to read one row of it.

How many it takes depends on the losses, hardly on the model: a tiny one with living random stacks stands for any.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

import torch
from libraries import load, new_library
from measure import DEVICE, Result, alternate, compare, counted, folder, main, repeats
from models import tuner_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from axolotl_brainstacks.evaluation import IGNORED, Batch, Example, batch_losses
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.discovery import discover
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.search import DomainSet

DOMAINS = ["chat", "code", "math", "medical", "reasoning", "legal", "history", "music"]
BATCH, TOKENS, VOCABULARY = 8, 32, 96
MIN_GAIN = RouterArgs().min_gain


def run(short: bool) -> Result:
    rows_each = 16 if short else 64
    rows = {domain: random_rows(rows_each, Random(domain)) for domain in DOMAINS[:5]}
    growing = {"chat": random_rows(2 * rows_each, Random("growth"))}
    with TemporaryDirectory() as path:
        counts = (2, 5, 8) if short else range(2, 9)
        meters = {str(count): new_meter(Path(path) / str(count), count) for count in counts}
        five = meters["5"]
        runs = {"ours": lambda: ours_best(*five, rows), "published": lambda: published_best(five[1], rows)}
        best, forwards = zip(*(with_forwards(five[1], find) for find in runs.values()), strict=True)
        seconds = alternate(runs, 1 if short else 3, warm_ups=0)
        growth = {count: partial(ours_best, *pair, growing) for count, pair in meters.items()}
        growth_forwards = {count: with_forwards(meters[count][1], find)[1] for count, find in growth.items()}
        growth_seconds = alternate(growth, repeats(True))
    medians = {count: median(values) for count, values in growth_seconds.items()}
    chart(medians, growth_forwards, folder(short) / "discovery.png")
    same = sum(mine == other for name in rows for mine, other in zip(best[0][name], best[1][name], strict=True))
    shown = f"discovery, 5 domains, batch {BATCH}"
    return Result(
        [
            counted(f"{shown}: forwards of equal size", "published loop", *forwards, "forwards", 1 / 5),
            compare(f"{shown}: time", "published loop", seconds["ours"], seconds["published"]),
        ],
        {"rows_each_domain": rows_each, "tokens": TOKENS, "batch": BATCH, "model": "random Llama, 4 layers, hidden 64"},
        {
            "same_best_set": f"{same} of {5 * rows_each} rows",
            "seconds": seconds,
            "growth": {"rows": 2 * rows_each, "seconds": growth_seconds, "forwards": growth_forwards},
        },
    )


def new_meter(path: Path, domains: int) -> tuple[Library, LossMeter]:
    base = tiny()
    library = new_library(path, base, DOMAINS[:domains], 1, scale=0.15)
    model = load(library, base)
    return library, LossMeter(model, tuner_of(model), DOMAINS[:domains], library.manifest.stacks, BATCH)


def tiny() -> PreTrainedModel:
    return (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
            )
        )
        .to(DEVICE)
        .eval()
    )


def random_rows(count: int, rng: Random) -> list[Example]:
    """Rows of equal length, so that forwards are of equal size."""
    rows = []
    for _ in range(count):
        tokens = [rng.randrange(VOCABULARY) for _ in range(TOKENS)]
        rows.append(Example(tokens, [IGNORED] * (TOKENS // 2) + tokens[TOKENS // 2 :]))
    return rows


def with_forwards[T](meter: LossMeter, find: Callable[[], T]) -> tuple[T, int]:
    """What `find` finds, and the number of the model's forwards it takes."""
    calls: list[None] = []
    handle = meter.tuner.model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(None))
    found = find()
    handle.remove()
    return found, len(calls)


def ours_best(library: Library, meter: LossMeter, rows: dict[str, list[Example]]) -> dict[str, list[DomainSet]]:
    for file in (library.path / "router/discovery").glob("*.jsonl"):
        file.unlink()  # what an earlier repeat measured
    # Without its progress bar.
    with library.writing(), redirect_stderr(StringIO()):
        found = discover(library, meter, rows, RouterArgs(search="greedy"))
    return {domain: [item.best for item in items] for domain, items in found.items()}


@torch.no_grad()
def published_best(meter: LossMeter, rows: dict[str, list[Example]]) -> dict[str, list[DomainSet]]:
    """Row by row: base, every domain, then greedy growth; each loss is one row out of a forward of its whole batch."""

    def loss(batch: Batch, row: int, names: DomainSet) -> float:
        with meter.tuner.using_stacks([stack.name for stack in meter.stacks if stack.domain in names]):
            total, tokens = batch_losses(meter.model, batch)[row]
        return total / tokens

    def best_of(batch: Batch, row: int) -> DomainSet:
        best: DomainSet = ()
        lowest = loss(batch, row, best)
        while len(best) < len(meter.domains):
            grown = [tuple(d for d in meter.domains if d in (*best, new)) for new in meter.domains if new not in best]
            losses = {names: loss(batch, row, names) for names in grown}
            choice = min(losses, key=lambda names: losses[names])
            if lowest - losses[choice] <= MIN_GAIN:
                break
            best, lowest = choice, losses[choice]
        return best

    found: dict[str, list[DomainSet]] = {}
    for domain, items in rows.items():
        batches = [Batch.of(items[start : start + BATCH], DEVICE) for start in range(0, len(items), BATCH)]
        found[domain] = [best_of(batch, row) for batch in batches for row in range(len(batch.input_ids))]
    return found


def chart(seconds: dict[str, float], forwards: dict[str, int], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axes.plot([int(count) for count in seconds], list(seconds.values()), "o-", label="seconds")
    axes.set(xlabel="domains", ylabel="seconds of discovery", ylim=(0, None))
    other = axes.twinx()
    other.plot([int(count) for count in forwards], list(forwards.values()), "s--", color="grey", label="forwards")
    other.set(ylabel=f"forwards of {BATCH} rows", ylim=(0, None))
    figure.legend(loc="upper left", bbox_to_anchor=(0.15, 0.95))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(run)
