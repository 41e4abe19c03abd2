"""What was considered for speed and left out: what it would gain, on SmolLM2-135M shapes with 9 frozen stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gemma12b
import torch
import torch.nn.functional as F
from measure import DEVICE, Comparison, Result, alternate, compare, main, repeats
from models import EXPERTS, RANK, SMOLLM2_SIZES, TOP_K, random_ids, smollm2, tuner_of, with_stacks
from torch import Tensor

from axolotl_brainstacks.adapter.gating import Gating, gated

STACKS, HIDDEN, COLUMNS = 9, 576, 128
GATING = Gating(EXPERTS, RANK, TOP_K, 1.0)
ON = 4  # stacks that answer: 2 domains x 2
# The seven projections of a decoder layer, (in, out).
SHAPES = {
    "SmolLM2-135M": [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
    "Gemma 3 12B": [*gemma12b.PROJECTIONS.values()],
}


def run(short: bool) -> Result:
    rows = [
        a_side("one A-side product for q, k, v: training", 512, 3, True, short),
        a_side("one A-side product for gate, up: training", 512, 2, True, short),
        a_side("one A-side product for q, k, v: a token's answer", 1, 3, False, short),
        a_side("one A-side product for gate, up: a token's answer", 1, 2, False, short),
        kept_projection(short),
        *(used_experts(what, shapes, short) for what, shapes in SHAPES.items()),
    ]
    return Result(rows, SMOLLM2_SIZES | {"frozen": STACKS, "columns": COLUMNS, "on": ON, "shapes": SHAPES})


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
        layer.module_name: torch.linalg.qr(torch.randn(layer.out_features, COLUMNS))[0]
        for layer in tuner.brainstacks_layers()
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


def used_experts(what: str, shapes: Sequence[tuple[int, int]], short: bool) -> Comparison:
    """A token's deltas by the experts that it uses alone, gathered first, and by all of them, the unused with gate 0."""
    layers = 30 if shapes[0][0] < 1000 else 2  # together larger than the caches
    banks = [
        (
            torch.randn(ON, EXPERTS + EXPERTS * RANK, wide, device=DEVICE) * 0.02,
            torch.randn(ON, EXPERTS * RANK, out, device=DEVICE) * 0.02,
            torch.randn(1, wide, device=DEVICE),
            torch.randn(1, out, device=DEVICE),
        )
        for _ in range(layers)
        for wide, out in shapes
    ]
    first_rank = torch.arange(ON, device=DEVICE)[:, None] * EXPERTS
    gate_rows = (torch.arange(ON, device=DEVICE)[:, None, None] + 1) * EXPERTS
    ranks = torch.arange(RANK, device=DEVICE)

    def dense(inputs: Tensor, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(x, inputs.flatten(0, 1)).unflatten(-1, (ON, -1))
        return torch.addmm(y, gated(h, GATING)[0], outputs.flatten(0, 1))

    def gathered(inputs: Tensor, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        values, chosen = torch.matmul(inputs[:, :EXPERTS], x[0]).topk(TOP_K, dim=-1)
        experts = chosen + first_rank
        rows = torch.add(ranks, experts.unsqueeze(-1), alpha=RANK)
        a = inputs.flatten(0, 1).index_select(0, (rows + gate_rows).flatten())
        b = outputs.flatten(0, 1).index_select(0, rows.flatten())
        z = torch.mv(a, x[0]).view(-1, RANK) * values.softmax(-1).view(-1, 1)
        return torch.addmm(y, z.view(1, -1), b)

    def repeated(delta: Callable[..., Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def many() -> None:
            for bank in banks:
                delta(*bank)

        return many

    for bank in banks[: len(shapes)]:
        torch.testing.assert_close(gathered(*bank), dense(*bank), rtol=1e-3, atol=1e-3)
    times = alternate({"gathered": repeated(gathered), "dense": repeated(dense)}, repeats(short))
    return compare(f"a token's deltas by used experts alone, {what}", "by all", times["gathered"], times["dense"])


if __name__ == "__main__":
    main(run)
