"""How a training step's time and memory grow with frozen stacks, against PEFT's LoRA: SmolLM2-135M and a Gemma layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
from measure import (
    ON_GPU,
    Result,
    alternate,
    compare,
    counted,
    folder,
    in_fresh_process,
    main,
    memory,
    peak_memory,
    repeats,
)
from models import (
    SMOLLM2_SIZES,
    attach_random,
    gemma3_12b_layer,
    smollm2,
    training_step,
    tuner_of,
    use_first,
    with_lora,
    with_stacks,
)
from peers import with_loops

COUNTS = (0, 1, 2, 4, 8, 9, 16)
SHORT_COUNTS = (0, 4, 9)
GEMMA_ROWS = 1
BF16: Final = "bfloat16"
LOOP_ROWS = 1  # the loop keeps every expert's output: with 4 rows more than 20 GB


def run(short: bool) -> Result:
    counts = SHORT_COUNTS if short else COUNTS
    smol, gemma = smollm2_times(counts, short), gemma_times(short)
    step_bytes = {name: in_fresh_process(step_memory, name, counts) for name in ("ours", "lora")}
    lora_bytes = step_bytes["lora"]["lora"]
    seconds = {str(count): median(smol[str(count)]) for count in counts}
    fits = {"seconds": line(seconds), "bytes": line(step_bytes["ours"])}
    chart(seconds, median(smol["lora"]), step_bytes["ours"], lora_bytes, folder(short) / "frozen_stacks.png")
    nine = "train step, 9 frozen stacks"
    comparisons = [
        compare(f"{nine}, SmolLM2-135M", "PEFT LoRA r=64", smol["9"], smol["lora"], reach=2.0),
        compare(f"{nine}, one Gemma 3 12B layer", "PEFT LoRA r=64", gemma["9"], gemma["lora"], reach=1.3),
        counted(
            "memory of the step and 9 frozen stacks, without the base model",
            "PEFT LoRA r=64",
            step_bytes["ours"]["9"],
            lora_bytes,
            "B",
        ),
    ]
    if BF16 in smol:
        comparisons.append(compare(f"{nine} in {BF16}, SmolLM2-135M", "PEFT LoRA r=64", smol[BF16], smol["lora"]))
    if not short:
        comparisons.append(
            compare("train step, 16 frozen stacks, SmolLM2-135M", "PEFT LoRA r=64", smol["16"], smol["lora"])
        )
        one_row = f"{nine}, SmolLM2-135M, {LOOP_ROWS} row"
        comparisons.append(compare(one_row, "loop over stacks and experts", smol["one row"], smol["loop"]))
    sizes = SMOLLM2_SIZES | {"counts": counts, "gemma": f"one layer, {GEMMA_ROWS} x 128 tokens"}
    return Result(comparisons, sizes, {"smollm2": smol, "gemma": gemma, "step_bytes": step_bytes, "fits": fits})


def smollm2_times(counts: Sequence[int], short: bool) -> dict[str, list[float]]:
    """Seconds of steps by number of frozen stacks; of `lora`; and where fp32 is the rule, of 9 stacks in bf16. In the long
    form of a `loop` over 9 stacks too, and of ours on as many rows."""
    base = smollm2()
    model = with_stacks(base, max(counts))
    runs = {"lora": training_step(with_lora(base))} | dict.fromkeys(map(str, counts), training_step(model))
    if not ON_GPU:
        runs[BF16] = training_step(with_stacks(base, 9, BF16))
    if not short:
        runs |= {
            "loop": training_step(with_loops(base, 9), LOOP_ROWS),
            "one row": training_step(model, LOOP_ROWS),
        }
    on = {name: int(name) for name in runs if name.isdigit()} | {"one row": 9}
    return alternate(runs, repeats(short), lambda name: name in on and use_first(model, on[name]))


def gemma_times(short: bool) -> dict[str, list[float]]:
    base = gemma3_12b_layer()
    model = with_stacks(base, 9)
    runs = {"lora": training_step(with_lora(base), GEMMA_ROWS)}
    runs |= dict.fromkeys(("0", "9"), training_step(model, GEMMA_ROWS))
    return alternate(runs, repeats(short), lambda name: name.isdigit() and use_first(model, int(name)))


def step_memory(name: str, counts: Sequence[int]) -> dict[str, int]:
    """Peak bytes by number of frozen stacks (or of `lora`): what a step and the frozen stacks add to the base model."""
    base = smollm2()
    before = memory()
    if name == "lora":
        step = training_step(with_lora(base))
        step()
        return {"lora": peak_memory(step) - before}
    model = with_stacks(base)
    step = training_step(model)
    step()
    peaks = {}
    for count in counts:
        while len(tuner_of(model).stacks) < count:
            attach_random(model)
        peaks[str(count)] = peak_memory(step) - before
    return peaks


def line(values: Mapping[str, float]) -> dict[str, float]:
    """Least squares over numbers of stacks: `first` + `each` * stacks, and the share of the variance it explains."""
    x, y = np.array([int(count) for count in values], float), np.array(list(values.values()), float)
    each, first = np.polyfit(x, y, 1)
    unexplained = ((y - first - each * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return {"first": float(first), "each": float(each), "r2": float(1 - unexplained)}


def chart(
    seconds: Mapping[str, float], lora: float, step_bytes: Mapping[str, float], lora_bytes: float, path: Path
) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, values, reference, unit in ((left, seconds, lora, 1.0), (right, step_bytes, lora_bytes, 1e9)):
        counts = [int(count) for count in values]
        axes.plot(counts, [value / unit for value in values.values()], "o", label="measured")
        fit = line(values)
        axes.plot(counts, [(fit["first"] + fit["each"] * count) / unit for count in counts], "-", label="line fitted")
        axes.axhline(reference / unit, color="grey", linestyle="--", label="LoRA r=64")
        axes.set(xlabel="frozen stacks", ylim=(0, None))
        axes.legend()
    left.set_ylabel("seconds a step")
    right.set_ylabel("GB above the base model")
    figure.suptitle("One training step of SmolLM2-135M, 4 x 128 tokens")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(run)
