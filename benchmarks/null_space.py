"""The null space at Gemma 3 12B shapes: bytes of V against dense projectors; time and memory of fitting one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gemma12b import LAYERS, PROJECTIONS
from measure import Result, alternate, compare, counted, in_fresh_process, main, memory, peak_memory, repeats
from torch import Tensor

from axolotl_brainstacks.adapter.nullspace import RankGram, fit_directions

DIRECTIONS, SAMPLES, TOKENS, BATCH = 64, 400, 64, 8
RANKS = 2 * 64  # one earlier domain of two stacks
SHORT_PROJECTIONS = ("k_proj", "o_proj")


def run(short: bool) -> Result:
    names = SHORT_PROJECTIONS if short else tuple(PROJECTIONS)
    outputs = [PROJECTIONS[name][1] for name in names]
    problems = [problem(out) for out in outputs]
    fits = {"ours": partial(fit_all, ours, problems), "dense": partial(fit_all, dense, problems)}
    seconds = alternate(fits, repeats(True))
    entries = LAYERS * sum(out * out for _, out in PROJECTIONS.values())
    columns = LAYERS * sum(out * DIRECTIONS for _, out in PROJECTIONS.values())
    what = "null-space state, Gemma 3 12B, 64 directions"
    shown = f"one layer's {', '.join(names)}"
    comparisons = [
        counted(f"{what}, in one number format", "dense bf16 projectors", 2 * columns, 2 * entries, "B", 1 / 100),
        counted(f"{what}, as held (fp32)", "dense bf16 projectors", 4 * columns, 2 * entries, "B", 1 / 100),
        counted(f"{what} for each of 4 domains, fp32", "dense bf16 projectors", 16 * columns, 2 * entries, "B"),
        compare(f"fitting {shown}", "svd_lowrank of means + dense", seconds["ours"], seconds["dense"]),
    ]
    if not short:
        ours_peak, dense_peak = (in_fresh_process(fit_peak, fit, max(outputs)) for fit in (ours, dense))
        comparisons.append(counted("memory of fitting the widest projection", "the same", ours_peak, dense_peak, "B"))
    return Result(
        comparisons,
        {"directions": DIRECTIONS, "samples": SAMPLES, "tokens": TOKENS, "ranks": RANKS, "projections": names},
        {"seconds": seconds},
    )


def problem(out: int) -> tuple[Tensor, Tensor]:
    """Rank-space activations (samples, tokens, ranks) and B matrices (ranks, out) of an earlier domain."""
    return torch.randn(SAMPLES, TOKENS, RANKS), torch.randn(RANKS, out) / RANKS**0.5


def ours(z: Tensor, output: Tensor) -> Tensor:
    """V (out, directions), from every token's activations."""
    gram = RankGram()
    for rows in z.split(BATCH):
        gram.add(rows, torch.full(rows.shape[:2], 1 / TOKENS))
    assert gram.total is not None
    return fit_directions(gram.total, output, None, DIRECTIONS).columns


def dense(z: Tensor, output: Tensor) -> Tensor:
    """The published way: randomised SVD of one mean delta a sample, and the projector (out, out) written out."""
    means = z.mean(1) @ output
    _, _, v = torch.svd_lowrank(means, q=DIRECTIONS)
    return (v @ v.T).to(torch.bfloat16)


def fit_all(fit: Callable[[Tensor, Tensor], Tensor], problems: list[tuple[Tensor, Tensor]]) -> None:
    for z, output in problems:
        fit(z, output)


def fit_peak(fit: Callable[[Tensor, Tensor], Tensor], out: int) -> int:
    """Bytes that a fit needs besides its inputs."""
    z, output = problem(out)
    fit(*problem(64))  # libraries take their working memory once
    before = memory()
    return peak_memory(partial(fit, z, output)) - before


if __name__ == "__main__":
    main(run)
