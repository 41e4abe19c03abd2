"""The search over sets of domains: which sets are measured for a prompt, and which one is best. It does not use the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

from axolotl_brainstacks.router_args import DiscoveryArgs

# Domains in the library's order; () is the empty set.
DomainSet = tuple[str, ...]
Losses = Mapping[DomainSet, float]

MAX_EXHAUSTIVE = 8
# With `search: auto`, up to this many domains are searched exhaustively: growing and shrinking would measure hardly fewer sets.
EXHAUSTIVE_BY_ITSELF = 4


@dataclass(frozen=True)
class Choice:
    """The best set so far. It is final when no set is missing.

    Attributes:
        best: the set with the lowest cost among those that have been measured.
        found_by: where the set comes from, the first that applies of `base`, `all_on`, a name that the caller gave, and the step
            of the search: `exhaustive`, or `grown` or `shrunk`.
        missing: sets that must be measured next.
    """

    best: DomainSet
    found_by: str
    missing: list[DomainSet]


@dataclass(frozen=True)
class Search:
    """Finds the set of domains with the lowest cost, asking for the losses of further sets as it goes on.

    The cost of a set is its loss plus `min_gain` for each of its domains; between equal costs the smaller set wins. So a
    set wins over a smaller one only if its loss is lower by more than `min_gain` for each additional domain. The published loop
    lets the first domain in at any gain. Here the rule holds for it as well, because a smaller gain is noise and a stack costs
    time in every answer.

    Attributes:
        domains: all domains, in the library's order.
        min_gain: in nats per answer token.
        exhaustive: whether to measure all sets, instead of growing a set from the base and shrinking one from all domains.
        soft_domains: for each of these domains, the best set with the domain added is measured as well.
    """

    domains: tuple[str, ...]
    min_gain: float
    exhaustive: bool
    soft_domains: tuple[str, ...] = ()

    @classmethod
    def of(cls, domains: Sequence[str], args: DiscoveryArgs) -> Self:
        """The search that the settings describe.

        Raises:
            ValueError: for `search: exhaustive` with more than `MAX_EXHAUSTIVE` domains.
        """
        if args.search == "exhaustive" and len(domains) > MAX_EXHAUSTIVE:
            raise ValueError(
                f"brainstacks.router.search is `exhaustive`, which tries all 2^D sets, but there are {len(domains)} domains; "
                f"up to {MAX_EXHAUSTIVE} are allowed: set it to `greedy`"
            )
        exhaustive = args.search == "exhaustive" or (args.search == "auto" and len(domains) <= EXHAUSTIVE_BY_ITSELF)
        return cls(tuple(domains), args.min_gain, exhaustive, tuple(d for d in domains if d in args.soft_domains))

    def choose(self, losses: Losses, named: Sequence[tuple[str, DomainSet]] = ()) -> Choice:
        """The best set according to the losses that are known.

        Call it again with the losses of the `missing` sets, until none is missing.

        Args:
            losses: in nats per answer token, by set.
            named: sets to measure in addition to those of the search, each with a name.
        """
        asked: dict[DomainSet, str] = {}
        for name, domain_set in [("base", ()), ("all_on", self.domains), *named, *self._searched(losses)]:
            asked.setdefault(domain_set, name)  # the first name of a set is the simplest
        while True:
            known = [domain_set for domain_set in asked if domain_set in losses]
            best = min(known, key=lambda domain_set: self.cost(losses, domain_set), default=())
            if len(known) == len(asked):
                # Nothing is missing, so `best` is known. A set with a soft domain may be new, and may turn out to be better.
                for domain in self.soft_domains:
                    asked.setdefault(self.joined(best, domain), "grown")
            missing = [domain_set for domain_set in asked if domain_set not in losses]
            if missing or len(known) == len(asked):
                return Choice(best, asked[best], missing)

    def cost(self, losses: Losses, domain_set: DomainSet) -> tuple[float, int, list[int]]:
        """A sort key by which the best set is the least: the cost in nats, then the number of domains, then their order."""
        order = [self.domains.index(domain) for domain in domain_set]
        return losses[domain_set] + self.min_gain * len(domain_set), len(domain_set), order

    def joined(self, domain_set: DomainSet, *more: str) -> DomainSet:
        """The union of a set and further domains, in the library's order."""
        return tuple(domain for domain in self.domains if domain in domain_set or domain in more)

    def _searched(self, losses: Losses) -> Iterator[tuple[str, DomainSet]]:
        """The sets that the search asks for, as far as the known losses lead it, each with the step that asks."""
        if self.exhaustive:
            for size in range(len(self.domains) + 1):
                yield from (("exhaustive", subset) for subset in combinations(self.domains, size))
            return
        yield from (("grown", domain_set) for domain_set in self._walked(losses, (), grow=True))
        yield from (("shrunk", domain_set) for domain_set in self._walked(losses, self.domains, grow=False))

    def _walked(self, losses: Losses, here: DomainSet, grow: bool) -> Iterator[DomainSet]:
        """Greedy descent from the set `here`, adding (`grow`) or removing one domain at a time.

        Yields every neighbour of every set on the way. The descent stops where no neighbour costs less, or where the loss of a
        neighbour is not known yet.
        """
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
