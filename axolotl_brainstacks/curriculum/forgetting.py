"""What later domains did to earlier ones (arXiv 2604.01152, forgetting matrix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.curriculum.ledger import Measured
from axolotl_brainstacks.evaluation import Example


def forgetting_row(
    tuner: StackTuner, domains: Sequence[Measured], every_stack: list[str], loss: Callable[[list[Example]], float]
) -> dict[str, dict[str, float]]:
    """Losses of all domains: `own_stacks` must never change later, `all_stacks` shows what routing is needed for."""
    row: dict[str, dict[str, float]] = {"own_stacks": {}, "all_stacks": {}}
    for domain in domains:
        for kind, names in (("own_stacks", domain.context), ("all_stacks", every_stack)):
            with tuner.using_stacks(names):
                row[kind][domain.name] = loss(domain.rows)
    return row
