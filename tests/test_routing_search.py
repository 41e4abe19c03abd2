from itertools import combinations
from random import Random
from typing import Any

import pytest

from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.search import Choice, DomainSet, Search

DOMAINS = ("chat", "code", "math", "medical")
EVERY = [subset for size in range(5) for subset in combinations(DOMAINS, size)]
Table = dict[DomainSet, float]


def search(*domains: str, **settings: Any) -> Search:
    return Search.of(domains or DOMAINS, RouterArgs(**{"search": "greedy"} | settings))


def run(search: Search, table: Table, *named: tuple[str, DomainSet]) -> tuple[Choice, Table]:
    """The final choice, and the losses that had to be looked up for it."""
    known: Table = {}
    while True:
        choice = search.choose(known, named)
        if not choice.missing:
            return choice, known
        assert not set(choice.missing) & set(known), "asked for a loss that is known"
        assert len(choice.missing) == len(set(choice.missing)), "asked for a loss twice"
        known |= {names: table[names] for names in choice.missing}


def random_table(rng: Random) -> Table:
    return {names: rng.uniform(1, 2) for names in EVERY}


def cost(table: Table, names: DomainSet, min_gain: float) -> float:
    return table[names] + min_gain * len(names)


def rising(base: float = 1.0) -> Table:
    """Every domain makes everything worse."""
    return {names: base + 0.1 * len(names) for names in EVERY}


def test_growth_adds_the_best_domain_while_it_is_worth_it() -> None:
    table = rising(2.0) | {
        ("code",): 1.4, ("chat",): 1.5, ("code", "math"): 1.2, ("chat", "code"): 1.3, ("chat", "code", "math"): 1.191
    }  # fmt: skip
    choice, known = run(search(), table)
    assert (choice.best, choice.found_by) == (("code", "math"), "grown"), "chat + code + math gains only 0.009"
    grown = {(), *((d,) for d in DOMAINS)} | {names for names in EVERY if "code" in names and len(names) == 2}
    grown |= {names for names in EVERY if {"code", "math"} <= set(names) and len(names) == 3}
    shrunk = {names for names in EVERY if len(names) >= 3}
    assert grown <= set(known) and shrunk <= set(known)
    assert run(search(min_gain=0.005), table)[0].best == ("chat", "code", "math")


def test_a_good_set_that_growth_does_not_reach_is_found_by_shrinking() -> None:
    """Every single domain harms, three of them together help: growth stops at the base."""
    table = rising() | {("chat", "code", "math"): 0.5, DOMAINS: 0.9}
    choice, _ = run(search(), table)
    assert (choice.best, choice.found_by) == (("chat", "code", "math"), "shrunk")
    table[DOMAINS] = 0.4
    choice, _ = run(search(), table)
    assert (choice.best, choice.found_by) == (DOMAINS, "all_on")


def test_a_named_set_that_no_search_reaches_is_the_best_if_its_loss_is_lowest() -> None:
    table = rising() | {("code", "medical"): 0.3}
    assert run(search(), table)[0] == Choice((), "base", [])
    named = [("own_label", ("medical",)), ("trained_with", ("code", "medical"))]
    choice, known = run(search(), table, *named)
    assert (choice.best, choice.found_by) == (("code", "medical"), "trained_with") and ("medical",) in known
    table = rising() | {("code",): 0.5, ("code", "math"): 0.2}
    assert run(search(), table, *named)[0].found_by == "grown"
    table |= {("medical",): 0.1}
    assert run(search(), table, *named)[0].found_by == "own_label"


@pytest.mark.parametrize("kind", ["auto", "greedy", "exhaustive"])
@pytest.mark.parametrize("min_gain", [0.0, 0.01, 0.1])
def test_no_measured_set_costs_less_than_the_best(kind: str, min_gain: float) -> None:
    rng, least = Random(11), 0.0
    for _ in range(100):
        table = random_table(rng)
        named = [("own_label", (rng.choice(DOMAINS),)), ("trained_with", DOMAINS[: rng.randint(1, 4)])]
        choice, known = run(search(search=kind, min_gain=min_gain), table, *named)
        assert {(), DOMAINS, *(names for _, names in named)} <= set(known), "always measured"
        for names in known:
            regret = table[names] - table[choice.best]
            assert regret >= min_gain * (len(choice.best) - len(names)) - 1e-12, "a larger set has to earn its size"
            least = min(least, regret)
    assert (least < 0) == (min_gain > 0), "the rule never decided anything"


@pytest.mark.parametrize("min_gain", [0.0, 0.1])
def test_exhaustive_is_never_worse_than_greedy(min_gain: float) -> None:
    rng, better = Random(5), 0
    for _ in range(200):
        table = random_table(rng)
        one, other = (run(search(search=kind, min_gain=min_gain), table) for kind in ("greedy", "exhaustive"))
        assert len(other[1]) == 16
        costs = [cost(table, choice.best, min_gain) for choice in (one[0], other[0])]
        assert costs[1] == min(cost(table, names, min_gain) for names in EVERY) <= costs[0]
        better += costs[1] < costs[0]
    assert better > 0, "on random tables greedy must miss the best set at times"


def test_the_first_domain_too_has_to_be_worth_min_gain() -> None:
    """The published loop lets it in at any gain."""
    table = rising() | {("code",): 0.995}
    assert run(search(), table)[0].best == ()
    assert run(search(min_gain=0.004), table)[0].best == ("code",)


@pytest.mark.parametrize("kind", ["greedy", "exhaustive"])
def test_a_gain_of_exactly_min_gain_is_not_enough(kind: str) -> None:
    for table in ({(): 1.0, ("chat",): 0.75}, {(): 0.5, ("chat",): 0.5}):
        assert run(search("chat", search=kind, min_gain=0.25), table)[0].best == ()
    table = rising(2.0) | {("chat",): 1.0, ("chat", "code"): 0.75}
    assert run(search(search=kind, min_gain=0.25), table)[0].best == ("chat",)


def test_a_soft_domain_added_to_the_best_set_is_always_measured() -> None:
    """Whatever found that set, and also where adding it makes a better one."""
    six = (*DOMAINS, "law", "music")
    every = [names for size in range(7) for names in combinations(six, size)]
    rng, further, improved = Random(3), 0, 0
    for _ in range(200):
        table = {names: rng.uniform(1, 2) for names in every}
        named = [("trained_with", ("chat", "math", "law"))]
        plain, before = run(search(*six), table, *named)
        choice, known = run(search(*six, soft_domains=["music", "code"]), table, *named)
        for domain in ("music", "code"):
            assert tuple(d for d in six if d in choice.best or d == domain) in known
        assert cost(table, choice.best, 0.01) == min(cost(table, names, 0.01) for names in known)
        further += len(known) > len(before)
        improved += choice.best != plain.best
    assert further and improved


def test_auto_tries_every_set_of_up_to_four_domains() -> None:
    assert len(run(search(search="auto"), random_table(Random(1)))[1]) == 16
    five = (*DOMAINS, "reasoning")
    table = {names: len(names) + 1.0 for size in range(6) for names in combinations(five, size)}
    known = run(search(*five, search="auto"), table)[1]
    assert len(known) < 32, "greedy from five domains on"


def test_exhaustive_refuses_more_than_eight_domains() -> None:
    search(*(f"d{i}" for i in range(8)), search="exhaustive")
    with pytest.raises(ValueError, match=r"brainstacks.router.search.*9 domains.*greedy"):
        search(*(f"d{i}" for i in range(9)), search="exhaustive")
