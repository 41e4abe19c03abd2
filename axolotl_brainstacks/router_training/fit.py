"""Trains the router's network on the targets that discovery gives (arXiv 2604.01152, outcome router)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_brainstacks.router.features import pad_right
from axolotl_brainstacks.router.router import Router
from axolotl_brainstacks.router_args import DiscoveryArgs, FitArgs
from axolotl_brainstacks.router_training.search import DomainSet


def target(
    losses: Mapping[DomainSet, float],
    best: DomainSet,
    labels: Sequence[str],
    domains: Sequence[str],
    args: DiscoveryArgs,
) -> list[float]:
    """The probabilities that the router should give a prompt, one per domain.

    A domain's discovered target is 1 in the best set; 0.5 for a soft domain outside it that lowers the loss, by any amount, when
    it is added to the set; 0 otherwise. The result blends this with the prompt's own labels, if it has any.

    Args:
        losses: of the prompt, by set of domains.
        best: its best set.
        labels: the domains that it was written for.
        domains: all domains, in the router's order.
        args: `label_blend` and `soft_domains`.
    """

    def discovered(domain: str) -> float:
        if domain in best:
            return 1.0
        added = tuple(other for other in domains if other in best or other == domain)
        return 0.5 if domain in args.soft_domains and losses[added] < losses[best] else 0.0

    blend = args.label_blend if labels else 0.0
    return [(1 - blend) * discovered(domain) + blend * (domain in labels) for domain in domains]


@dataclass(frozen=True)
class Prompts:
    """The prompts of one part of the split.

    Attributes:
        features: of each prompt, (tokens, features), fp32, on the CPU.
        targets: (prompts, domains), fp32, on the CPU.
    """

    features: list[Tensor]
    targets: Tensor

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts `indices` on `device`: features (rows, tokens, features), mask (rows, tokens), targets (rows, domains)."""
        hidden, mask = pad_right([self.features[i] for i in indices])
        return hidden.to(device), mask.to(device), self.targets[list(indices)].to(device)


@dataclass(frozen=True)
class Score:
    """How well probabilities match targets.

    Attributes:
        top1: share of prompts whose most probable domain has the highest target.
        set_match: share of prompts whose domains with a probability of at least 0.5 are those with a target of at least 0.5.
        bce: mean binary cross-entropy in nats.
    """

    top1: float
    set_match: float
    bce: float

    @classmethod
    def of(cls, probabilities: Tensor, targets: Tensor) -> Score:
        """The score of `probabilities` and `targets`, both (prompts, domains) on the same device."""
        picked = targets.gather(1, probabilities.argmax(1, keepdim=True)).squeeze(1)
        return cls(
            top1=float((picked == targets.max(1).values).float().mean()),
            set_match=float(((probabilities >= 0.5) == (targets >= 0.5)).all(1).float().mean()),
            bce=float(F.binary_cross_entropy(probabilities, targets)),
        )

    def total(self, weights: tuple[float, float, float]) -> float:
        """The sum of top1, set_match and bce with the given weights; that of bce is negative."""
        return weights[0] * self.top1 + weights[1] * self.set_match + weights[2] * self.bce


def fit(router: Router, train: Prompts, validation: Prompts, args: FitArgs, device: torch.device) -> list[Score]:
    """Train the router in place. Afterwards it has the weights of the epoch with the best validation score.

    The same seed, data and device give the same weights.

    Returns:
        The validation scores of all epochs.
    """
    network = router.network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    count = len(train.features)
    steps = args.epochs * -(-count // args.batch_size)  # batches per epoch, rounded up
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scores: list[Score] = []
    best = deepcopy(network.state_dict())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        for _ in range(args.epochs):
            network.train()
            for indices in torch.randperm(count).split(args.batch_size):
                hidden, mask, targets = train.batch(indices.tolist(), device)
                loss = objective(network(hidden, mask), targets, args)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()
                schedule.step()
            scores.append(Score.of(probabilities(router, validation, args.batch_size, device), validation.targets))
            # Among equal scores the later epoch wins: it has been trained for longer.
            if scores[-1].total(args.score) >= max(score.total(args.score) for score in scores):
                best = deepcopy(network.state_dict())
    network.load_state_dict(best)
    return scores


def objective(logits: Tensor, targets: Tensor, args: FitArgs) -> Tensor:
    """The training loss: binary cross-entropy, plus a hinge that pushes probabilities away from 0.5.

    Args:
        logits: (rows, domains).
        targets: (rows, domains).
        args: weight and width of the hinge.

    Returns:
        A scalar, in nats.
    """
    undecided = F.relu(args.confidence_margin - (logits.sigmoid() - 0.5).abs()).mean()
    return F.binary_cross_entropy_with_logits(logits, targets) + args.confidence_coef * undecided


def probabilities(router: Router, prompts: Prompts, batch_size: int, device: torch.device) -> Tensor:
    """The router's probabilities for all prompts, (prompts, domains), on the CPU."""
    parts = torch.arange(len(prompts.features)).split(batch_size)
    batches = (prompts.batch(part.tolist(), device) for part in parts)
    return torch.cat([router.route(hidden, mask).probabilities.cpu() for hidden, mask, _ in batches])
