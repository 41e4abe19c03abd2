"""From the router's probabilities to the weights that domains get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_brainstacks.args import GateArgs


def gate(probabilities: Tensor, domains: Sequence[str], args: GateArgs) -> tuple[Tensor, Tensor]:
    """Weights (rows, domains), and whether a row is uncovered (rows,): no domain passed, floors aside.

    A domain passes at `gate_threshold`; it then weighs its probability (`weights: soft`, arXiv 2604.01152) or 1 (`hard`:
    the scale its stacks were trained at). Floors apply to every row.

    Args:
        probabilities: (rows, domains), in the order of `domains`.
    """
    passed = probabilities >= args.gate_threshold
    weights = torch.where(passed, torch.ones_like(probabilities) if args.weights == "hard" else probabilities, 0.0)
    floors = torch.tensor([args.floors.get(domain, 0.0) for domain in domains], device=weights.device)
    return torch.maximum(weights, floors), ~passed.any(-1)
