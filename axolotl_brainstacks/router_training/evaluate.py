"""Evaluation of the router: the losses that its choices lead to on unseen prompts, compared with other choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_brainstacks.router_training.data import MIXED, Sample
from axolotl_brainstacks.router_training.discovery import DiscoveryResult
from axolotl_brainstacks.router_training.search import DomainSet

# The choices of stacks that are compared:
#   base: none.                                          ungated: all.
#   own_label: those of the prompt's own domains.        trained_with: those that were on when these domains were trained.
#   soft, hard: the router's, at the configured threshold, with soft or hard weights.
#   router: the router's with the calibrated settings, which answers use.
#   discovered: those of the best set of domains that was measured.
CHOICES = ("base", "ungated", "own_label", "trained_with", "soft", "hard", "router", "discovered")
ALL = "all domains"


@dataclass(frozen=True)
class EvaluatedPrompt:
    """An unseen prompt and its losses.

    Attributes:
        sample: the prompt with its answer.
        losses: by choice, the mean loss per answer token in nats. `own_label` and `trained_with` are missing for a prompt
            without labels.
        uncovered: whether no domain's probability reached the threshold.
    """

    sample: Sample
    losses: Mapping[str, float]
    uncovered: bool


def summary(
    judged: Sequence[EvaluatedPrompt], samples: Sequence[Sample], found: Sequence[DiscoveryResult], has_floors: bool
) -> dict[str, Any]:
    """The figures of the evaluation.

    Args:
        judged: the unseen prompts.
        samples: all prompts.
        found: their discovery results, in the same order.
        has_floors: whether a domain has a floor, which acts even if no domain is chosen.

    Returns:
        By key, a mapping from source to

        - `losses`: the mean of each choice's losses over unseen prompts, their `regret` (router minus discovered), and the
          numbers `prompts` and `uncovered`;
        - `winners`: how often each set of domains was best, over all prompts, most frequent first;
        - `found_by`: how often each step of the search found the best set, most frequent first;
        - `leaves_out_own`: the share of prompts whose best set lacks one of their own domains.
    """
    losses = {}
    for source in dict.fromkeys(j.sample.source for j in judged):
        losses[source] = _row([j for j in judged if j.sample.source == source])
    losses[ALL] = _row([j for j in judged if j.sample.source != MIXED])
    by_source: dict[str, list[tuple[Sample, DiscoveryResult]]] = {}
    for sample, item in zip(samples, found, strict=True):
        by_source.setdefault(sample.source, []).append((sample, item))
    return {
        "losses": losses,
        "winners": {
            source: dict(Counter(set_title(item.best, has_floors) for _, item in pairs).most_common())
            for source, pairs in by_source.items()
        },
        "found_by": {
            source: dict(Counter(item.found_by for _, item in pairs).most_common())
            for source, pairs in by_source.items()
        },
        "leaves_out_own": {
            source: sum(not set(sample.labels) <= set(item.best) for sample, item in pairs) / len(pairs)
            for source, pairs in by_source.items()
            if all(sample.labels for sample, _ in pairs)
        },
    }


def _row(judged: Sequence[EvaluatedPrompt]) -> dict[str, float | int]:
    """The row of one source in the table of losses."""
    row: dict[str, float | int] = {"prompts": len(judged), "uncovered": sum(j.uncovered for j in judged)}
    for choice in CHOICES:
        if all(choice in j.losses for j in judged):
            row[choice] = sum(j.losses[choice] for j in judged) / len(judged)
    return row | {"regret": row["router"] - row["discovered"]}


def set_title(names: DomainSet, has_floors: bool = False) -> str:
    """A set of domains for the tables. The empty set is the base model unless domains have floors."""
    return " + ".join(names) or ("floors only" if has_floors else "base")
