"""Time per token of a routed answer, 2 domains x 2 stacks, against the base model: SmolLM2-135M, whose growth with
stacks is measured too, and a Gemma 3 12B layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from frozen_stacks import line
from libraries import load, new_library
from measure import ON_GPU, Result, alternate, compare, folder, main, repeats, synchronise
from models import gemma3_12b_layer, random_ids, smollm2, tuner_of
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.names import FrozenDtype
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router_args import RouterArgs

DOMAINS = ["chat", "code", "math", "medical"]
PROMPT, ANSWER = 64, 16
COUNTS = (0, 1, 2, 4, 6, 8)
SHORT_COUNTS = (0, 4, 8)


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        synchronise()
        self.times.append(time.perf_counter())

    def end(self) -> None: ...

    def per_token(self) -> float:
        """Median seconds from token to token; the prompt itself is put first."""
        return median(after - before for before, after in zip(self.times[1:], self.times[2:], strict=False))


def run(short: bool) -> Result:
    counts = SHORT_COUNTS if short else COUNTS
    smol, smol_whole = measured(smollm2(), DOMAINS, counts, short)
    halved, halved_whole = ({}, {}) if ON_GPU else measured(smollm2(), DOMAINS[:2], (), short, "bfloat16")
    gemma, gemma_whole = measured(gemma3_12b_layer(), DOMAINS[:2], (), short)
    growth = {str(count): median(smol[f"{count} stacks"]) for count in counts}
    chart(growth, median(smol["base"]), folder(short) / "decode.png")
    token, peer = "decode, a token, 2 domains x 2 stacks", "base model without PEFT"
    rows = [
        compare(f"{token}, SmolLM2-135M", peer, smol["routed"], smol["base"], reach=1.25),
        compare(f"{token}, one Gemma 3 12B layer", peer, gemma["routed"], gemma["base"], reach=1.25),
        compare(f"answer of {ANSWER} tokens, SmolLM2-135M", peer, smol_whole["routed"], smol_whole["base"]),
        compare("decode, a token, 8 stacks, SmolLM2-135M", peer, smol["8 stacks"], smol["base"]),
        compare("choosing a prompt's route", "base model's token", smol_whole["router"], smol["base"]),
    ]
    if halved:
        rows.append(compare(f"{token} in bfloat16, SmolLM2-135M", peer, halved["routed"], halved["base"]))
    return Result(
        rows,
        {"prompt": PROMPT, "answer": ANSWER, "rows": 1, "counts": counts},
        {
            "smollm2": smol,
            "smollm2, bf16 stacks": halved,
            "gemma": gemma,
            "answers": {"smollm2": smol_whole, "smollm2, bf16 stacks": halved_whole, "gemma": gemma_whole},
            "fit": line(growth),
        },
    )


def measured(
    base: PreTrainedModel,
    domains: Sequence[str],
    counts: Sequence[int],
    short: bool,
    frozen_dtype: FrozenDtype = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a token, and of whole answers and of the `router`: of the `base` model, `routed`, and with `n stacks` on."""
    base.eval()
    ids = random_ids(base, 1, PROMPT)
    per_token: dict[str, list[float]] = {}

    def answer(name: str, model: Any, **settings: Any) -> Callable[[], None]:
        per_token[name] = []

        def generate() -> None:
            clock = Clock()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=ANSWER,
                max_new_tokens=ANSWER,
                streamer=clock,
                **settings,
            )
            per_token[name].append(clock.per_token())

        return generate

    with TemporaryDirectory() as path:
        library = new_library(Path(path) / "library", base, domains, 2, frozen_dtype=frozen_dtype)
        with_router(library, domains, base.config.hidden_size)
        model = load(library, base)
        tuner = tuner_of(model)
        stacks = [stack.name for stack in tuner.stacks]
        tuner.use_stacks(None)  # all are in memory from here on
        weights = dict(zip(domains[:2], (1.0, 0.8), strict=True))
        runs = {"base": answer("base", base), "routed": answer("routed", model, domains=weights)}
        runs |= {f"{count} stacks": answer(f"{count} stacks", model) for count in counts}

        def prepare(name: str) -> None:
            if name.endswith("stacks"):
                count = int(name.split()[0])
                tuner.use_stacks(stacks[:count], torch.full((1, count), 0.9))

        whole = alternate(runs, repeats(short), prepare)
        whole |= alternate({"router": lambda: model.route(ids)}, repeats(short))
    return {name: values[1:] for name, values in per_token.items()}, whole  # without the warm-up


def with_router(library: Library, domains: Sequence[str], features: int) -> None:
    """A router of the usual size that has learned nothing."""
    args = RouterArgs()
    config = RouterConfig(
        domains=list(domains), features=features, width=args.width, dropout=args.dropout, gate=args.gate()
    )
    Router.fresh(config, seed=0).save(library)


def chart(growth: dict[str, float], base: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    counts, fit = [int(count) for count in growth], line(growth)
    axes.plot(counts, [value * 1e3 for value in growth.values()], "o", label="measured")
    axes.plot(counts, [(fit["first"] + fit["each"] * count) * 1e3 for count in counts], "-", label="line fitted")
    axes.axhline(base * 1e3, color="grey", linestyle="--", label="base model")
    axes.set(xlabel="stacks that are on", ylabel="ms a token", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(run)
