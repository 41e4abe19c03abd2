from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.routed import meter_of, new_library, random_rows, tiny_base
from torch import Tensor

from axolotl_brainstacks.evaluation import IGNORED, Example
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.calibrate import KINDS, THRESHOLDS, calibrate, clearly_lower, gate_losses
from axolotl_brainstacks.router_training.discovery import DiscoveryResult, discover
from axolotl_brainstacks.router_training.measure import LossMeter

DOMAINS = ["chat", "code", "math"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, LossMeter]:
    torch.manual_seed(17)
    base = tiny_base()
    made = new_library(tmp_path_factory.mktemp("calibrate") / "library", base, DOMAINS, stacks=2)
    return made, meter_of(made, base)


def found_in(library: tuple[Library, LossMeter], rows: list[Example], args: RouterArgs) -> list[DiscoveryResult]:
    """Every set of domains measured."""
    made, meter = library
    with made.writing():
        return discover(made, meter, {"chat": rows}, args)["chat"]


@torch.no_grad()
def plain_losses(meter: LossMeter, rows: list[Example], weights: Tensor) -> list[float]:
    """Each row alone under its weights (rows, domains)."""
    losses = []
    for row, factors in zip(rows, weights, strict=True):
        per_stack = torch.stack([factors[DOMAINS.index(stack.domain)] for stack in meter.stacks])[None]
        with meter.tuner.using_stacks([stack.name for stack in meter.stacks], per_stack):
            logits = meter.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED)))
    return losses


@pytest.mark.parametrize("floors", [{}, {"chat": 0.2, "math": 0.4}])
def test_the_calibrated_gate_answers_validation_prompts_clearly_better(
    library: tuple[Library, LossMeter], floors: dict[str, float]
) -> None:
    meter, rows = library[1], random_rows(12, Random(1))
    args = RouterArgs(floors=floors, gate_threshold=0.37)
    found = found_in(library, rows, args)
    probabilities = torch.rand(12, 3, generator=torch.Generator().manual_seed(2))
    chosen, tried = calibrate(meter, found, probabilities, args)
    expected: dict[tuple[float, str], float] = {}
    for threshold in (*THRESHOLDS, 0.37):
        for kind in KINDS:
            weights, _ = gate(probabilities, DOMAINS, args.gate(kind, threshold))
            expected[threshold, kind] = sum(plain_losses(meter, rows, weights)) / 12
    assert {(t["gate_threshold"], t["weights"]): t["loss"] for t in tried} == pytest.approx(expected, abs=1e-4)
    per_prompt = {
        (threshold, kind): plain_losses(meter, rows, gate(probabilities, DOMAINS, args.gate(kind, threshold))[0])
        for threshold, kind in expected
    }
    gains = {pair: np.subtract(per_prompt[0.37, "soft"], losses) for pair, losses in per_prompt.items()}
    clear = [pair for pair, gain in gains.items() if gain.mean() > 2 * gain.std(ddof=1) / 12**0.5]
    best = min(clear, key=lambda pair: expected[pair], default=(0.37, "soft"))
    assert expected[chosen.gate_threshold, chosen.weights] == pytest.approx(expected[best], abs=1e-4)
    assert chosen.floors == floors
    assert max(expected.values()) > min(expected.values()) + 0.01, "nothing to choose between"


class Counting(LossMeter):
    """Notes every (row, weights) that is measured."""

    asked: list[tuple[tuple[int, ...], tuple[float, ...]]]

    def losses(self, rows: Any, weights: Tensor, progress: Any = None) -> list[float]:
        self.asked += [(tuple(row.input_ids), tuple(w.tolist())) for row, w in zip(rows, weights, strict=True)]
        return super().losses(rows, weights, progress)


def test_nothing_is_measured_twice(library: tuple[Library, LossMeter]) -> None:
    """Hard weights are sets that discovery has measured; soft ones are the same under many thresholds."""
    meter, rows, args = library[1], random_rows(6, Random(3)), RouterArgs(floors={"code": 0.3})
    found = found_in(library, [*rows, rows[0]], args)
    counting = Counting(meter.model, meter.tuner, meter.domains, meter.stacks, 8)
    counting.asked = []
    probabilities = torch.rand(7, 3, generator=torch.Generator().manual_seed(4))
    probabilities[6] = probabilities[0]
    gates = [args.gate(kind, threshold) for threshold in THRESHOLDS for kind in KINDS]
    losses = gate_losses(counting, found, probabilities, gates)
    assert len(counting.asked) == len(set(counting.asked)) > 0
    assert not any(set(weights) <= {0.0, 1.0, torch.tensor(0.3).item()} for _, weights in counting.asked)
    assert all(each[6] == each[0] for each in losses)


def test_named_weights_keep_their_threshold_and_measure_nothing(library: tuple[Library, LossMeter]) -> None:
    args = RouterArgs(weights="soft", gate_threshold=0.61)
    rows = random_rows(3, Random(5))
    found, forwards = found_in(library, rows, args), library[1].forwards
    chosen, tried = calibrate(library[1], found, torch.full((3, 3), 0.6), args)
    assert (chosen.weights, chosen.gate_threshold, tried) == ("soft", 0.61, [])
    assert library[1].forwards == forwards


def test_of_gates_that_cost_the_same_the_configured_threshold_is_kept(library: tuple[Library, LossMeter]) -> None:
    """Probabilities above every threshold: it makes no difference."""
    args = RouterArgs(gate_threshold=0.4)
    found = found_in(library, random_rows(4, Random(6)), args)
    chosen, _ = calibrate(library[1], found, torch.full((4, 3), 0.9), args)
    assert chosen.gate_threshold == 0.4


def test_a_gate_has_to_win_by_more_than_two_standard_errors() -> None:
    soft = [1.0, 2.0, 3.0, 4.0]
    assert clearly_lower([0.9, 1.9, 2.8, 3.9], soft)
    lucky = [0.2, 2.3, 3.3, 4.1]  # a lower mean, by one prompt
    assert sum(lucky) < sum(soft) and not clearly_lower(lucky, soft)
    assert not clearly_lower(soft, soft) and not clearly_lower([0.1], [1.0])


def test_a_gate_that_wins_clearly_is_chosen(library: tuple[Library, LossMeter]) -> None:
    """The router gives each prompt's best domains a probability just below the configured threshold."""
    meter, args = library[1], RouterArgs(gate_threshold=0.12)
    found = found_in(library, random_rows(12, Random(8)), args)
    best = [min(item.losses, key=lambda domains: item.losses[domains]) for item in found]
    assert sum(map(bool, best)) > 6, "stacks help most prompts"
    probabilities = torch.tensor([[0.1 if domain in domains else 0.0 for domain in DOMAINS] for domains in best])
    chosen, _ = calibrate(meter, found, probabilities, args)
    assert (chosen.gate_threshold, chosen.weights) == (0.05, "hard")
