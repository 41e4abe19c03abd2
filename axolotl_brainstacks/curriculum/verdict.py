"""Whether a round's stack enters the library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from axolotl_brainstacks.adapter.tensors import OUTPUT
from axolotl_brainstacks.curriculum.guard import Guard, Objective
from axolotl_brainstacks.curriculum.stages import Stage
from axolotl_brainstacks.library import RoundRecord


def loss_so_far(rounds: Sequence[RoundRecord]) -> float:
    """A domain's validation loss after these rounds, with the stacks that were kept, in nats per answer token."""
    return next((record.loss_after for record in reversed(rounds) if record.kept), rounds[0].loss_before)


def unscored(guard: Guard) -> str | None:
    """Why a round cannot be judged: its objective was not finite before the first step. None if it was."""
    if guard.start is None or math.isfinite(guard.start):
        return None
    return f"the held-out {guard.objective.key.removeprefix('eval_')} was not finite before the first step"


def unusable(tensors: Mapping[str, Tensor]) -> str | None:
    """Why a stack must not enter the library: it is not finite, or a B is all zero. None if neither is so."""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            return f"{key} has NaN or infinite values; lower learning_rate"
    dead = [key for key, tensor in tensors.items() if key.endswith(OUTPUT) and not tensor.any()]
    if len(dead) == sum(key.endswith(OUTPUT) for key in tensors):
        return "no step made it better than its start"
    if dead:
        return f"{dead[0]} is all zero, so the projection has learned nothing; raise learning_rate or max_steps"
    return None


def why_dropped(record: RoundRecord, stage: Stage, objective: Objective, supervised_loss: float) -> str | None:
    """Why a measured round is not kept; None if it helped.

    A supervised round has to lower the validation loss by `boosting.min_loss_delta`, because its stack costs memory and time
    in every later step and answer. An RL round has to improve its own objective. The RL rounds of a domain together may raise
    the validation loss by at most `rl.max_loss_increase` above `supervised_loss`, the loss after the supervised rounds.
    """
    gain = record.loss_before - record.loss_after
    if not record.rl:
        least = stage.block.boosting.min_loss_delta
        if gain > 0 and gain >= least:
            return None
        return (
            f"the validation loss went from {record.loss_before:.4f} to {record.loss_after:.4f}, a gain below {least}"
        )
    before, after = record.objective_before, record.objective_after
    assert before is not None and after is not None
    name, most = objective.key.removeprefix("eval_"), stage.block.rl.max_loss_increase
    if not objective.sign * (before - after) > 0:
        return f"the held-out {name} went from {before:.4f} to {after:.4f}"
    if not record.loss_after - supervised_loss <= most:
        return (
            f"the domain's validation loss rose from {supervised_loss:.4f} to {record.loss_after:.4f}, more than "
            f"brainstacks.rl.max_loss_increase ({most})"
        )
    return None
