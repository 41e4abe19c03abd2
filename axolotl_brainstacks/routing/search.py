"""Which sets of domains have to be measured to know a prompt's best one, and which one that is. No model here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

# Domains in the library's order; () is the base.
DomainSet = tuple[str, ...]
# Losses known of one row -> the best set so far, and the sets still to be measured; none when the search is over.
Search = Callable[[Mapping[DomainSet, float]], tuple[DomainSet, list[DomainSet]]]

MAX_EXHAUSTIVE = 8


def greedy(domains: Sequence[str], min_gain: float) -> Search:
    """Start from the base and add the best domain while it lowers the loss by more than `min_gain` (paper section 1)."""

    def search(losses: Mapping[DomainSet, float]) -> tuple[DomainSet, list[DomainSet]]:
        best: DomainSet = ()
        while True:
            grown = [tuple(d for d in domains if d in best or d == new) for new in domains if new not in best]
            if missing := [domain_set for domain_set in [best, *grown] if domain_set not in losses]:
                return best, missing
            choice = min(grown, key=lambda domain_set: losses[domain_set], default=best)
            if losses[best] - losses[choice] <= min_gain:
                return best, []
            best = choice

    return search


def exhaustive(domains: Sequence[str], min_gain: float) -> Search:
    """Of all 2^D sets the one with the lowest loss, where every domain of a set has to be worth `min_gain`.

    Raises:
        ValueError: for more than 8 domains.
    """
    if len(domains) > MAX_EXHAUSTIVE:
        raise ValueError(
            f"brainstacks.router.search is `exhaustive`, which tries all 2^D sets, but there are {len(domains)} domains; "
            f"up to {MAX_EXHAUSTIVE} are allowed: set it to `greedy`"
        )
    every = [subset for size in range(len(domains) + 1) for subset in combinations(domains, size)]

    def search(losses: Mapping[DomainSet, float]) -> tuple[DomainSet, list[DomainSet]]:
        if missing := [domain_set for domain_set in every if domain_set not in losses]:
            return (), missing
        return min(every, key=lambda domain_set: losses[domain_set] + min_gain * len(domain_set)), []

    return search
