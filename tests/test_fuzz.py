"""Hostile libraries and adapters, by the hundred: a clear error or no harm. `benchmarks/attack.py` tries more."""

from collections import Counter

import pytest
from support import fuzzed_answers, fuzzed_files, fuzzing

ATTACKS = fuzzed_files.ATTACKS | fuzzed_answers.ATTACKS
SEED, COUNT = 20261124, 60
# What is never refused, as no answer comes from it.
UNUSED = "the router's records, answering"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_accepted_wrongly_crashes_or_hangs(name: str) -> None:
    trials = list(fuzzing.trials(name, ATTACKS[name], COUNT, SEED))
    assert [trial.what for trial in trials if trial.outcome not in ("refused", "harmless")] == []
    outcomes = Counter(trial.outcome for trial in trials)
    refused = outcomes["refused"] > COUNT / 10 or name == UNUSED
    assert len(trials) == COUNT and refused, "variants that nobody minds prove nothing"


@pytest.mark.filterwarnings("ignore")
def test_whole_ones_are_accepted() -> None:
    """Otherwise each variant could be refused for a wrong reason."""
    for name in ("manifest", "bytes of any file", "stack files", "LoRA import", *fuzzed_answers.ATTACKS):
        attempts = fuzzing.trials(name, ATTACKS[name], COUNT, SEED + 1)
        assert any(trial.outcome == "harmless" for trial in attempts), name
