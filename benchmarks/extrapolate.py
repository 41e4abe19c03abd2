"""Gemma 3 12B with 10 and 50 domains of 2 stacks, FLOPs and bytes counted; the count is checked on a real layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gemma12b import HEAD_WIDTHS, HIDDEN, LAYER_PARAMETERS, LAYERS, PROJECTIONS, VOCABULARY
from measure import ON_GPU, Comparison, Result, alternate, compare, counted, main, repeats
from models import EXPERTS, RANK, gemma3_12b_layer, training_step, use_first, with_lora, with_stacks

TOKENS = 128
RANKS = EXPERTS * RANK
STACKS_EACH, DIRECTIONS = 2, 64
# NF4 with double quantisation: 4 bits, 8 per block of 64, 32 per 256 blocks.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
BF16, FP32 = 2, 4
BASE_BYTES = LAYERS * LAYER_PARAMETERS * NF4 + VOCABULARY * HIDDEN * BF16
STACK_NUMBERS = LAYERS * sum((EXPERTS + RANKS) * i + RANKS * o for i, o in PROJECTIONS.values())


def forward_flops(tokens: int) -> dict[str, float]:
    """FLOPs of one layer's forward, a token: a multiply-add is 2. Stacks are dense: all experts are computed."""
    pairs = PROJECTIONS.values()
    return {
        "base": 2 * LAYER_PARAMETERS,
        "attention": 4 * tokens * HEAD_WIDTHS,  # scores and sums, no use made of causality
        "lora": sum(2 * RANKS * (i + o) for i, o in pairs),
        "frozen": sum(2 * ((EXPERTS + RANKS) * i + RANKS * o) for i, o in pairs),
        "trained": sum(2 * ((2 * EXPERTS + RANKS) * i + RANKS * o) for i, o in pairs),
    }


def step_flops(frozen: int | None, tokens: int, layers: int, head: bool, checkpointing: bool) -> float:
    """FLOPs of a training step, a token, with a LoRA for None. Frozen weights need no gradient: one backward pass each."""
    flops, again = forward_flops(tokens), int(checkpointing)
    of_adapter = flops["lora"] if frozen is None else flops["trained"]
    layer = (2 + again) * (flops["base"] + (frozen or 0) * flops["frozen"])
    layer += (3 + again) * (flops["attention"] + of_adapter)
    return layers * layer + (2 * 2 * VOCABULARY * HIDDEN if head else 0)


@dataclass(frozen=True)
class Counted:
    """What a library of `domains` costs on Gemma 3 12B. Bytes, and ratios against the base model or a LoRA r = 64."""

    domains: int
    step_flops_ratio: float
    training_stack_bytes: float
    disk_bytes: float
    answer_stack_bytes: float
    token_flops_ratio: float
    token_bytes_ratio: float
    token_bytes_ratio_all_on: float
    null_space_bytes: float
    null_space_used_of_k_proj: float
    sets_measured_a_prompt: int


def count(domains: int) -> Counted:
    """The last domain's last round; answers from 2 domains; a discovery whose best sets have 2 domains."""
    stacks = domains * STACKS_EACH
    tokens = 2048
    flops = forward_flops(tokens)
    token = LAYERS * (flops["base"] + flops["attention"]) + 2 * VOCABULARY * HIDDEN
    answering = 2 * STACKS_EACH
    columns = DIRECTIONS * (domains - 1)
    step = step_flops(stacks - 1, tokens, LAYERS, True, True) / step_flops(None, tokens, LAYERS, True, True)
    return Counted(
        domains=domains,
        step_flops_ratio=step,
        training_stack_bytes=(stacks - 1) * STACK_NUMBERS * BF16,
        disk_bytes=stacks * STACK_NUMBERS * FP32,
        answer_stack_bytes=answering * STACK_NUMBERS * BF16,
        token_flops_ratio=1 + answering * LAYERS * flops["frozen"] / token,
        token_bytes_ratio=1 + answering * STACK_NUMBERS * BF16 / BASE_BYTES,
        token_bytes_ratio_all_on=1 + stacks * STACK_NUMBERS * BF16 / BASE_BYTES,
        null_space_bytes=LAYERS * sum(columns * o for _, o in PROJECTIONS.values()) * FP32,
        null_space_used_of_k_proj=columns / PROJECTIONS["k_proj"][1],
        sets_measured_a_prompt=1 + domains + (domains - 1) + (domains - 2),
    )


def run(short: bool) -> Result:
    frozen = (9,) if short else (0, 9, 19)
    base = gemma3_12b_layer()
    model = with_stacks(base, max(frozen))
    runs = {"lora": training_step(with_lora(base), 1, TOKENS)}
    runs |= dict.fromkeys(map(str, frozen), training_step(model, 1, TOKENS))
    times = alternate(runs, repeats(short), lambda name: name != "lora" and use_first(model, int(name)))
    lora = step_flops(None, TOKENS, 1, False, ON_GPU)
    comparisons: list[Comparison] = []
    for stacks in frozen:
        by_count = step_flops(stacks, TOKENS, 1, False, ON_GPU) / lora
        ratios = [mine / other for mine, other in zip(times[str(stacks)], times["lora"], strict=True)]
        what = f"one Gemma 3 12B layer, {stacks} frozen stacks: step's time / LoRA's"
        comparisons.append(compare(what, "its FLOPs / LoRA's", ratios, [by_count] * len(ratios), "x"))
    counts = [count(10), count(50)]
    for found in counts:
        title = f"Gemma 3 12B, {found.domains} domains x {STACKS_EACH} stacks, counted"
        ratio, stack_bytes = found.step_flops_ratio, found.answer_stack_bytes
        comparisons += [
            counted(f"{title}: FLOPs of the last round's step", "LoRA r=64", ratio, 1, "x"),
            counted(f"{title}: stacks in memory for it", "NF4 base", found.training_stack_bytes, BASE_BYTES, "B"),
            counted(f"{title}: read for a token, 2 domains on", "NF4 base", BASE_BYTES + stack_bytes, BASE_BYTES, "B"),
        ]
    return Result(
        comparisons,
        {"layer": f"1 x {TOKENS} tokens", "frozen": frozen, "base_bytes": BASE_BYTES},
        {"seconds": times, "counted": [asdict(found) for found in counts], "forward_flops": forward_flops(TOKENS)},
    )


if __name__ == "__main__":
    main(run)
