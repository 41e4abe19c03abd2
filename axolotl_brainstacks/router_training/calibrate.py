"""Chooses the router's threshold and kind of weights by the loss that they lead to on validation prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import GateArgs, RouterArgs
from axolotl_brainstacks.router_training.discovery import DiscoveryResult, row_key, set_weights
from axolotl_brainstacks.router_training.measure import LossMeter

THRESHOLDS = (0.05, 0.12, 0.2, 0.3, 0.5, 0.7)
KINDS: tuple[Literal["soft", "hard"], ...] = ("soft", "hard")


def calibrate(
    meter: LossMeter, found: Sequence[DiscoveryResult], probabilities: Tensor, args: RouterArgs
) -> tuple[GateArgs, list[dict[str, Any]]]:
    """Choose a threshold and a kind of weights. Every process must call this.

    The configured threshold with soft weights is kept unless other settings have a clearly lower mean loss; then those with the
    lowest are chosen. With `weights: soft` or `hard`, nothing is measured and the configured settings are kept.

    Args:
        meter: measures the losses.
        found: the validation prompts, with the losses that are known.
        probabilities: (prompts, domains), the router's for these prompts.
        args: configured settings.

    Returns:
        The chosen settings; and for each settings tried, the threshold, the kind of weights and the mean loss per answer token
        in nats.
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
    # Of a dozen means over few prompts, the lowest is often lowest by chance and is not on other prompts. So a change has to be
    # larger than the standard error. gates[0] is the configured one, with soft weights.
    better = [i for i, each in enumerate(losses) if clearly_lower(each, losses[0])]
    return gates[min(better, key=lambda i: means[i], default=0)], tried


def clearly_lower(losses: Sequence[float], than: Sequence[float]) -> bool:
    """Whether the mean of `losses` is lower than that of `than` by more than two standard errors of the
    paired differences.

    Args:
        losses: one per prompt.
        than: of the same prompts, in the same order.

    Returns:
        False for fewer than two prompts.
    """
    gains = [other - loss for loss, other in zip(losses, than, strict=True)]
    return len(gains) > 1 and fmean(gains) > 2 * stdev(gains) / math.sqrt(len(gains))


def gate_losses(
    meter: LossMeter, found: Sequence[DiscoveryResult], probabilities: Tensor, gates: Sequence[GateArgs]
) -> list[list[float]]:
    """Losses of prompts under the weights that each of several settings gives them. Every process must call this.

    A prompt is not measured again under weights that it had in discovery or that other settings give it too.

    Args:
        meter: measures the losses.
        found: the prompts, with the losses that are known.
        probabilities: (prompts, domains), the router's for these prompts.
        gates: settings, all with the floors of discovery.

    Returns:
        For each settings a list with the mean loss per answer token of each prompt, in nats.
    """
    keys = [row_key(item.row) for item in found]
    known: dict[tuple[str, tuple[float, ...]], float] = {}
    for key, item in zip(keys, found, strict=True):
        for domain_set, loss in item.losses.items():
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
