"""What was considered for speed and left out: what it would gain, on SmolLM2-135M shapes with 9 frozen stacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import DEVICE, Comparison, Result, alternate, compare, main, repeats
from models import EXPERTS, RANK, SMOLLM2_SIZES, TOP_K, random_ids, smollm2, tuner_of, with_stacks
from torch import Tensor

from axolotl_brainstacks.adapter.gating import Gating, gated

STACKS, HIDDEN, COLUMNS = 9, 576, 128
GATING = Gating(EXPERTS, RANK, TOP_K, 1.0)


def run(short: bool) -> Result:
    rows = [
        a_side("one A-side product for q, k, v: training", 512, 3, True, short),
        a_side("one A-side product for gate, up: training", 512, 2, True, short),
        a_side("one A-side product for q, k, v: a token's answer", 1, 3, False, short),
        a_side("one A-side product for gate, up: a token's answer", 1, 2, False, short),
        kept_projection(short),
    ]
    return Result(rows, SMOLLM2_SIZES | {"frozen": STACKS, "columns": COLUMNS})


def a_side(what: str, tokens: int, projections: int, training: bool, short: bool) -> Comparison:
    """The rank-space activations of projections that read the same input, without what follows them."""
    x = torch.randn(1, tokens, HIDDEN, device=DEVICE, requires_grad=training)
    matrices = [
        torch.randn(STACKS * (EXPERTS + EXPERTS * RANK), HIDDEN, device=DEVICE) * 0.02 for _ in range(projections)
    ]
    together = torch.cat(matrices)
    upstream = [torch.randn(1, tokens, STACKS * EXPERTS * RANK, device=DEVICE) for _ in matrices]

    def activations(matrix: Tensor, stacks: int) -> Tensor:
        return gated(F.linear(x, matrix).unflatten(-1, (stacks, -1)), GATING)[0]

    def separate() -> list[Tensor]:
        return [activations(matrix, STACKS) for matrix in matrices]

    def shared() -> list[Tensor]:
        return list(activations(together, STACKS * projections).chunk(projections, -1))

    def repeated(make: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(10):
                with torch.set_grad_enabled(training):
                    found = make()
                if training:
                    torch.autograd.backward(found, upstream)

        return many

    times = alternate({"shared": repeated(shared), "separate": repeated(separate)}, repeats(short))
    return compare(what, "one product each", times["shared"], times["separate"])


def kept_projection(short: bool) -> Comparison:
    """An evaluation's forward with B' = B - V V^T B as it is, and with a B that needs no projection."""
    model = with_stacks(smollm2()).eval()
    ids, tuner = random_ids(model), tuner_of(model)
    bases = {
        layer.module_name: torch.linalg.qr(torch.randn(layer.out_features, COLUMNS))[0] for layer in tuner.layers()
    }

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    times = alternate(
        {"kept": forward, "projected": forward},
        repeats(short),
        lambda name: tuner.set_null_space("default", bases if name == "projected" else {}),
    )
    return compare("B projected once for all evaluation batches", "at each", times["kept"], times["projected"])


if __name__ == "__main__":
    main(run)
