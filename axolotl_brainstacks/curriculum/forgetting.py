"""Measures how training a domain changed the losses of the domains before it (arXiv 2604.01152, forgetting matrix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.curriculum.ledger import Measured
from axolotl_brainstacks.evaluation import Example


def forgetting_row(
    tuner: StackTuner, domains: Sequence[Measured], every_stack: list[str], loss: Callable[[list[Example]], float]
) -> dict[str, dict[str, float]]:
    """Measure all domains for one row of the forgetting matrix.

    Args:
        domains: the domains to measure.
        every_stack: names of all stacks.
        loss: the mean loss of examples, in nats per answer token, with the stacks that are on.

    Returns:
        Losses by domain, under two keys. `own_stacks`: with the stacks that were on when the domain was trained; later
        domains never change this loss. `all_stacks`: with every stack on; the difference is what a router has to avoid.
    """
    row: dict[str, dict[str, float]] = {"own_stacks": {}, "all_stacks": {}}
    for domain in domains:
        for kind, names in (("own_stacks", domain.context), ("all_stacks", every_stack)):
            with tuner.using_stacks(names):
                row[kind][domain.name] = loss(domain.rows)
    return row
