"""Hostile libraries and adapters, by the hundred: a clear error or no harm. `benchmarks/attack.py` tries more."""

from collections import Counter

import fuzzing
import pytest

SEED, COUNT = 20261124, 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", fuzzing.ATTACKS)
def test_nothing_is_accepted_wrongly_crashes_or_hangs(attack: str) -> None:
    trials = list(fuzzing.trials(attack, COUNT, SEED))
    assert [trial.what for trial in trials if trial.outcome not in ("refused", "harmless")] == []
    outcomes = Counter(trial.outcome for trial in trials)
    assert len(trials) == COUNT and outcomes["refused"] > COUNT / 10, "variants that nobody minds prove nothing"


def test_whole_ones_are_accepted(tmp_path: object) -> None:
    """Otherwise each variant could be refused for a wrong reason."""
    for attack in ("manifest", "bytes of any file", "stack files", "LoRA import"):
        assert "harmless" in {trial.outcome for trial in fuzzing.trials(attack, COUNT, SEED + 1)}
