"""A training step with 9 frozen stacks in CPU memory, copied a layer ahead, against the same stacks on the device.

On a CPU both read the same memory: what is left is the bookkeeping. On a GPU it is the copying that is not hidden, and
what it spares.
"""

from __future__ import annotations

from measure import ON_GPU, Result, alternate, compare, counted, in_fresh_process, main, memory, peak_memory, repeats
from models import SMOLLM2_SIZES, attach_random, smollm2, training_step, tuner_of, with_stacks
from peft import PeftModel
from transformers import PreTrainedModel

FROZEN = 9


def run(short: bool) -> Result:
    base = smollm2()
    steps = {name: training_step(stacked(base, name == "offloaded")) for name in ("offloaded", "resident")}
    times = alternate(steps, repeats(short))
    rows = [compare(f"train step, {FROZEN} frozen stacks offloaded", "not", times["offloaded"], times["resident"])]
    if ON_GPU:
        peaks = {name: in_fresh_process(peak, name == "offloaded") for name in steps}
        rows.append(counted("GPU memory of that step", "not", peaks["offloaded"], peaks["resident"], "B"))
    return Result(rows, SMOLLM2_SIZES | {"frozen": FROZEN})


def stacked(base: PreTrainedModel, offloaded: bool) -> PeftModel:
    model = with_stacks(base)
    if offloaded:
        tuner_of(model).offload_frozen()
    for _ in range(FROZEN):
        attach_random(model)
    return model


def peak(offloaded: bool) -> int:
    """Most bytes on the GPU during a step."""
    empty = memory()
    step = training_step(stacked(smollm2(), offloaded))
    step()
    return peak_memory(step) - empty


if __name__ == "__main__":
    main(run)
