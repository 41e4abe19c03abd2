"""What the router's choices cost on prompts it has never seen, next to what else could have been chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_brainstacks.routing.data import MIXED, Sample
from axolotl_brainstacks.routing.discovery import Found
from axolotl_brainstacks.routing.search import DomainSet

CHOICES = ("base", "ungated", "own_label", "router", "discovered")
ALL = "all domains"


@dataclass(frozen=True)
class Judged:
    """An unseen prompt: what was discovered about it, and its loss under the router's weights."""

    sample: Sample
    found: Found
    router_loss: float
    uncovered: bool

    def losses(self, domains: Sequence[str]) -> dict[str, float]:
        """Mean loss per answer token under each of `CHOICES` that there is."""
        own = tuple(domain for domain in domains if domain in self.sample.labels)
        known = self.found.losses
        losses = {"base": known[()], "ungated": known[tuple(domains)]}
        if own:
            losses["own_label"] = known[own]
        return losses | {"router": self.router_loss, "discovered": known[self.found.best]}


def summary(
    judged: Sequence[Judged],
    discovered: Mapping[str, Sequence[Found]],
    domains: Sequence[str],
) -> dict[str, Any]:
    """Losses are means over prompts, each of which counts alike.

    Keys: `losses`, by source, of each choice, with `regret` (router minus discovered) and the number of prompts;
    `winners`, by source, how often which set was best over all prompts discovered on, most frequent first.
    """
    losses = {}
    for source in dict.fromkeys(j.sample.source for j in judged):
        losses[source] = _row([j for j in judged if j.sample.source == source], domains)
    losses[ALL] = _row([j for j in judged if j.sample.source != MIXED], domains)
    winners = {
        source: {set_title(best): count for best, count in Counter(item.best for item in found).most_common()}
        for source, found in discovered.items()
    }
    return {"losses": losses, "winners": winners}


def _row(judged: Sequence[Judged], domains: Sequence[str]) -> dict[str, float | int]:
    each = [j.losses(domains) for j in judged]
    row: dict[str, float | int] = {"prompts": len(each), "uncovered": sum(j.uncovered for j in judged)}
    for choice in CHOICES:
        if all(choice in losses for losses in each):
            row[choice] = sum(losses[choice] for losses in each) / len(each)
    return row | {"regret": row["router"] - row["discovered"]}


def set_title(names: DomainSet) -> str:
    """A set of domains as it is printed."""
    return " + ".join(names) or "base"
