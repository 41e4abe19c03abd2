from itertools import combinations
from random import Random

import pytest

from axolotl_brainstacks.routing.search import DomainSet, Search, exhaustive, greedy

DOMAINS = ("chat", "code", "math", "medical")
EVERY = [subset for size in range(5) for subset in combinations(DOMAINS, size)]


def run(search: Search, table: dict[DomainSet, float]) -> tuple[DomainSet, dict[DomainSet, float]]:
    """The best set, and the losses that had to be looked up to find it."""
    known: dict[DomainSet, float] = {}
    while True:
        best, missing = search(known)
        if not missing:
            return best, known
        assert not set(missing) & set(known), "asked for a loss that is known"
        known |= {names: table[names] for names in missing}


def random_table() -> dict[DomainSet, float]:
    rng = Random()
    return {names: rng.uniform(1, 2) for names in EVERY}


def test_greedy_adds_the_best_domain_while_it_is_worth_it() -> None:
    table = random_table() | {
        (): 2.0, ("chat",): 1.5, ("code",): 1.4, ("math",): 1.9, ("medical",): 2.2,
        ("chat", "code"): 1.3, ("code", "math"): 1.2, ("code", "medical"): 1.5,
        ("chat", "code", "math"): 1.191, ("code", "math", "medical"): 1.5,
    }  # fmt: skip
    best, known = run(greedy(DOMAINS, 0.01), table)
    assert best == ("code", "math"), "chat + code + math gains only 0.009"
    assert len(known) == 1 + 4 + 3 + 2, "base, singles, then only the supersets of the best set so far"
    assert run(greedy(DOMAINS, 0.005), table)[0] != best


def test_greedy_stays_with_the_base_when_no_domain_gains_enough() -> None:
    table = random_table() | {(): 1.0, **{(d,): 0.995 for d in DOMAINS}}
    best, known = run(greedy(DOMAINS, 0.01), table)
    assert best == () and set(known) == {(), *((d,) for d in DOMAINS)}


def test_a_gain_of_exactly_the_threshold_is_not_enough() -> None:
    assert run(greedy(["chat"], 0.25), {(): 1.0, ("chat",): 0.75})[0] == ()


@pytest.mark.parametrize("min_gain", [0.0, 0.01, 0.1])
def test_exhaustive_is_never_worse_than_greedy(min_gain: float) -> None:
    better = 0
    for _ in range(200):
        table = random_table()
        grown, _ = run(greedy(DOMAINS, min_gain), table)
        best, known = run(exhaustive(DOMAINS, min_gain), table)
        assert len(known) == 16
        cost = {names: table[names] + min_gain * len(names) for names in EVERY}
        assert cost[best] == min(cost.values()) <= cost[grown]
        better += cost[best] < cost[grown]
    assert better > 0, "on random tables greedy must miss the best set at times"


def test_exhaustive_refuses_more_than_eight_domains() -> None:
    exhaustive([f"d{i}" for i in range(8)], 0.01)
    with pytest.raises(ValueError, match=r"brainstacks.router.search.*9 domains.*greedy"):
        exhaustive([f"d{i}" for i in range(9)], 0.01)
