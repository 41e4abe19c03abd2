"""Chooses the gate by what it costs: threshold and kind of weights, by measured loss on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from axolotl_brainstacks.args import GateArgs, RouterArgs
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_training.discovery import DiscoveryResult, row_key, set_weights
from axolotl_brainstacks.router_training.measure import LossMeter

THRESHOLDS = (0.05, 0.12, 0.2, 0.3, 0.5, 0.7)
KINDS: tuple[Literal["soft", "hard"], ...] = ("soft", "hard")


def calibrate(
    meter: LossMeter, found: Sequence[DiscoveryResult], probabilities: Tensor, args: RouterArgs
) -> tuple[GateArgs, list[dict[str, Any]]]:
    """The configured gate with soft weights, unless another one has a clearly lower mean loss; then the lowest.

    With `weights: soft` or `hard` it is the configured one, and nothing is measured. On every rank.

    Args:
        found: the validation prompts.
        probabilities: (prompts, domains), the router's for them.

    Returns:
        the gate, and for each gate tried its threshold, its kind of weights and its mean loss per answer token, nats.
    """
    if args.weights != "auto":
        return args.gate(), []
    thresholds = list(dict.fromkeys([args.gate_threshold, *THRESHOLDS]))
    gates = [args.gate(kind, threshold) for threshold in thresholds for kind in KINDS]
    losses = gate_losses(meter, found, probabilities, gates)
    means = [fmean(each) for each in losses]
    tried = [
        {"gate_threshold": tried.gate_threshold, "weights": tried.weights, "loss": mean}
        for tried, mean in zip(gates, means, strict=True)
    ]
    # The lowest of a dozen means on few prompts is often luck, which held-out prompts then do not confirm.
    better = [number for number, each in enumerate(losses) if clearly_lower(each, losses[0])]
    return gates[min(better, key=lambda number: means[number], default=0)], tried


def clearly_lower(losses: Sequence[float], than: Sequence[float]) -> bool:
    """Whether the mean of `losses` is below that of `than`, on the same prompts, by more than two standard errors of the
    paired differences. Never with fewer than two prompts."""
    gains = [other - loss for loss, other in zip(losses, than, strict=True)]
    return len(gains) > 1 and fmean(gains) > 2 * stdev(gains) / math.sqrt(len(gains))


def gate_losses(
    meter: LossMeter, found: Sequence[DiscoveryResult], probabilities: Tensor, gates: Sequence[GateArgs]
) -> list[list[float]]:
    """Mean loss per answer token of each prompt under the weights of each gate, nats: a list of prompts for each gate.

    Weights that a prompt was measured under before, by another gate or in discovery, are not measured again.
    """
    keys = [row_key(item.row) for item in found]
    known: dict[tuple[str, tuple[float, ...]], float] = {}
    for key, item in zip(keys, found, strict=True):
        for domain_set, loss in item.losses.items():
            # All gates have the same floors, those that discovery measured with.
            known[key, _tuple(set_weights(domain_set, meter.domains, gates[0].floors))] = loss
        if item.base is not None:
            known[key, (0.0,) * len(meter.domains)] = item.base
    weights = [gate(probabilities, meter.domains, tried)[0] for tried in gates]
    wanted = {
        (key, _tuple(row)): (item.row, row)
        for rows in weights
        for key, item, row in zip(keys, found, rows, strict=True)
        if (key, _tuple(row)) not in known
    }
    if wanted:
        rows, asked = zip(*wanted.values(), strict=True)
        known |= zip(wanted, meter.losses(rows, torch.stack(asked)), strict=True)
    return [[known[key, _tuple(row)] for key, row in zip(keys, rows, strict=True)] for rows in weights]


def _tuple(weights: Tensor) -> tuple[float, ...]:
    return tuple(weights.tolist())
