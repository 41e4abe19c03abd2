"""What the router's choices cost on prompts it has never seen, next to what else could have been chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_brainstacks.router_training.data import MIXED, Sample
from axolotl_brainstacks.router_training.discovery import DiscoveryResult
from axolotl_brainstacks.router_training.search import DomainSet

# base: no stack. ungated: all on. own_label: the domains that the prompt was written for. trained_with: those that were
# on when they were trained. soft, hard: the router at the configured threshold. router: the calibrated one, which
# answers. discovered: the best set found.
CHOICES = ("base", "ungated", "own_label", "trained_with", "soft", "hard", "router", "discovered")
ALL = "all domains"


@dataclass(frozen=True)
class EvaluatedPrompt:
    """An unseen prompt, its mean loss per answer token under each of `CHOICES` that there is, and whether the router
    claims it for no domain."""

    sample: Sample
    losses: Mapping[str, float]
    uncovered: bool


def summary(
    judged: Sequence[EvaluatedPrompt], samples: Sequence[Sample], found: Sequence[DiscoveryResult], has_floors: bool
) -> dict[str, Any]:
    """Losses are means over unseen prompts, each of which counts alike.

    Keys: `losses`, by source, of each choice, with `regret` (router minus discovered), the number of prompts and of
    uncovered ones. By source, over all `samples`, which discovery `found` something about: `winners`, how often which set
    was best; `found_by`, how often what found it; both most frequent first; `leaves_out_own`, the share of prompts
    whose best set lacks a domain that they were written for.
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
    row: dict[str, float | int] = {"prompts": len(judged), "uncovered": sum(j.uncovered for j in judged)}
    for choice in CHOICES:
        if all(choice in j.losses for j in judged):
            row[choice] = sum(j.losses[choice] for j in judged) / len(judged)
    return row | {"regret": row["router"] - row["discovered"]}


def set_title(names: DomainSet, has_floors: bool = False) -> str:
    """A set of domains as it is printed."""
    return " + ".join(names) or ("floors only" if has_floors else "base")
