"""Which sets of domains are measured for a prompt, and which of them is its best one. No model here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

from axolotl_brainstacks.args import DiscoveryArgs

# Domains in the library's order; () is the set of none.
DomainSet = tuple[str, ...]
Losses = Mapping[DomainSet, float]

MAX_EXHAUSTIVE = 8
# Up to here all 2^D sets are hardly more than what growing and shrinking look at.
EXHAUSTIVE_BY_ITSELF = 4


@dataclass(frozen=True)
class Choice:
    """The best of the sets asked for so far; final when none is missing.

    found_by: the simplest way to name the set: `base`, `all_on`, a name that the caller gave, or the step of the search
    that came upon it: `grown`, `shrunk`, `exhaustive`. missing: sets whose losses have to be known first.
    """

    best: DomainSet
    found_by: str
    missing: list[DomainSet]


@dataclass(frozen=True)
class Search:
    """Asks for the losses of more and more sets, and calls the one with the lowest cost the best.

    The cost of a set is its loss plus `min_gain` for each of its domains; of equal costs the smaller set's is lower. So
    a larger set has to be worth more than `min_gain` for each domain that it has more than a smaller one, also where
    the smaller one is the base. The published loop lets the first domain in at any gain; a stack that gains less than
    `min_gain` is noise, though, and costs time in every answer.

    soft_domains: each one's set `best + {domain}` is measured as well.
    """

    domains: tuple[str, ...]
    min_gain: float
    exhaustive: bool
    soft_domains: tuple[str, ...] = ()

    @classmethod
    def of(cls, domains: Sequence[str], args: DiscoveryArgs) -> Self:
        """The search that the settings ask for. Raises ValueError for `search: exhaustive` with more than 8 domains."""
        if args.search == "exhaustive" and len(domains) > MAX_EXHAUSTIVE:
            raise ValueError(
                f"brainstacks.router.search is `exhaustive`, which tries all 2^D sets, but there are {len(domains)} domains; "
                f"up to {MAX_EXHAUSTIVE} are allowed: set it to `greedy`"
            )
        exhaustive = args.search == "exhaustive" or (args.search == "auto" and len(domains) <= EXHAUSTIVE_BY_ITSELF)
        return cls(tuple(domains), args.min_gain, exhaustive, tuple(d for d in domains if d in args.soft_domains))

    def choose(self, losses: Losses, named: Sequence[tuple[str, DomainSet]] = ()) -> Choice:
        """The best set as far as `losses` are known.

        Args:
            named: further sets to be measured whatever the search does, with what each one is called.
        """
        asked: dict[DomainSet, str] = {}
        for name, domain_set in [("base", ()), ("all_on", self.domains), *named, *self._searched(losses)]:
            asked.setdefault(domain_set, name)
        while True:
            known = [domain_set for domain_set in asked if domain_set in losses]
            best = min(known, key=lambda domain_set: self.cost(losses, domain_set), default=())
            if len(known) == len(asked):
                for domain in self.soft_domains:
                    asked.setdefault(self.joined(best, domain), "grown")
            missing = [domain_set for domain_set in asked if domain_set not in losses]
            if missing or len(known) == len(asked):
                return Choice(best, asked[best], missing)

    def cost(self, losses: Losses, domain_set: DomainSet) -> tuple[float, int, list[int]]:
        """What the best set has least of: first the cost proper, in nats, then what decides between equal ones."""
        order = [self.domains.index(domain) for domain in domain_set]
        return losses[domain_set] + self.min_gain * len(domain_set), len(domain_set), order

    def joined(self, domain_set: DomainSet, *more: str) -> DomainSet:
        """The union, in the domains' order."""
        return tuple(domain for domain in self.domains if domain in domain_set or domain in more)

    def _searched(self, losses: Losses) -> Iterator[tuple[str, DomainSet]]:
        if self.exhaustive:
            for size in range(len(self.domains) + 1):
                yield from (("exhaustive", subset) for subset in combinations(self.domains, size))
            return
        yield from (("grown", domain_set) for domain_set in self._walked(losses, (), grow=True))
        yield from (("shrunk", domain_set) for domain_set in self._walked(losses, self.domains, grow=False))

    def _walked(self, losses: Losses, here: DomainSet, grow: bool) -> Iterator[DomainSet]:
        """The neighbours of every set on the way from `here`: one domain more, or less, as long as that costs less."""
        while True:
            if grow:
                near = [self.joined(here, domain) for domain in self.domains if domain not in here]
            else:
                near = [tuple(other for other in here if other != domain) for domain in here]
            yield from near
            if any(domain_set not in losses for domain_set in [here, *near]):
                return
            best = min([here, *near], key=lambda domain_set: self.cost(losses, domain_set))
            if best == here:
                return
            here = best
