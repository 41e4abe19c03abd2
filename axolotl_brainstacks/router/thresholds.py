"""The router's thresholds: how probabilities become weights of domains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from axolotl_brainstacks.router_args import GateArgs


def gate(probabilities: Tensor, domains: Sequence[str], args: GateArgs) -> tuple[Tensor, Tensor]:
    """Turn probabilities into weights.

    A domain is on from the probability `gate_threshold`. Its weight is then its probability (`weights: soft`, as in arXiv
    2604.01152) or 1 (`weights: hard`, the scale at which its stacks were trained), but at least its floor. Domains that are off
    get their floor.

    Args:
        probabilities: (rows, domains).
        domains: names, in the order of the columns.
        args: threshold, kind of weights and floors.

    Returns:
        Weights (rows, domains), and whether a row is uncovered (rows,), bool: no probability reached the threshold.
    """
    passed = probabilities >= args.gate_threshold
    on = torch.ones_like(probabilities) if args.weights == "hard" else probabilities
    weights = torch.where(passed, on, 0.0)
    floors = torch.tensor([args.floors.get(domain, 0.0) for domain in domains], device=weights.device)
    return torch.maximum(weights, floors), ~passed.any(-1)
