"""Keeps the best weights of a round, and ends a round that goes wrong (arXiv 2604.01152, best-weights guard)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.curriculum.checkpoints import STATE_FILE, Fingerprint
from axolotl_brainstacks.distributed import barrier, gather_objects, gathered

LOG = get_logger(__name__)

WEIGHTS_FILE = "brainstacks_best.safetensors"


@dataclass(frozen=True)
class Objective:
    """The quantity that a round has to improve on held-out examples, as the trainer's evaluation reports it.

    key: its name among the evaluation's metrics.
    sign: 1 for a loss, -1 for a reward; the guard minimises ``sign * value``.
    worst_rise: the round ends when ``sign * value`` exceeds its best value, or with `from_start` its first, by this.
    reason: the `stop_reason` of a round that ends so.
    """

    key: str = "eval_loss"
    sign: int = 1
    worst_rise: float = 0.1
    from_start: bool = False
    reason: str = "spike"


class Guard(TrainerCallback):
    """Copies the stack's weights whenever the objective improves, and stops on a spike, a non-finite value, or no gain.

    The first evaluation comes before the first step, so a round that never improves gets its initial weights back: a stack
    with B = 0, which changes nothing. All decisions depend on values that the trainer has reduced over the ranks, so all
    ranks decide alike.

    Args:
        adapter: PEFT's name of the stack in training.
        patience: how many evaluations in a row may bring no gain.
        loss_spike: in RL rounds, stop when a logged training loss exceeds the first one by this; None: never.
        fingerprint: what a checkpoint has to have in common with this round to be resumed from.
    """

    def __init__(
        self,
        tuner: StackTuner,
        adapter: str,
        patience: int,
        objective: Objective,
        loss_spike: float | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.tuner, self.adapter, self.patience, self.objective = tuner, adapter, patience, objective
        self.loss_spike = loss_spike
        self.fingerprint = fingerprint or Fingerprint.of({})
        self.start: float | None = None  # of the objective, with its sign
        self.start_metrics: dict[str, float] = {}
        self.first_loss: float | None = None
        self.best_loss = math.inf
        self.best: dict[str, Tensor] | None = None
        self.evaluations_without_gain = 0
        self.evaluated_step = -1
        self.stop_reason = "finished"
        self.closed = False
        # Tells whether a checkpoint written now would hold all that the next step needs.
        self.resumable: Callable[[], bool] = lambda: True
        self._report: str | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Copy the weights if the objective has improved, else decide whether the round ends."""
        if self.closed:
            return
        metrics = kwargs["metrics"]
        value = metrics.get(self.objective.key)
        loss = math.nan if value is None else self.objective.sign * value
        self.evaluated_step = state.global_step
        if self.start is None:
            self.start, self.start_metrics = loss, evaluation_figures(metrics)
        if loss < self.best_loss:  # False for NaN
            self.best_loss, self.best, self.evaluations_without_gain = loss, self._snapshot(), 0
            return
        self.evaluations_without_gain += 1
        anchor = self.start if self.objective.from_start else self.best_loss
        if not math.isfinite(loss):
            self._stop(control, f"non-finite {self.objective.key.removeprefix('eval_')}")
        elif loss > anchor + self.objective.worst_rise:
            self._stop(control, self.objective.reason)
        elif self.evaluations_without_gain >= self.patience:
            self._stop(control, "patience")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the round if the logged training loss, reward or gradient norm is not finite, or the loss has spiked."""
        # `name_metrics` puts `<domain>/round<n>/` before every name, so names are compared by their end.
        logs = {f"/{key}": value for key, value in kwargs["logs"].items() if isinstance(value, float)}
        # With fp16 an infinite gradient is routine: the step is skipped and the loss scale halved.
        endings = ("/loss", "/reward") if args.fp16 else ("/loss", "/reward", "/grad_norm")
        if any(key.endswith(endings) and not math.isfinite(value) for key, value in logs.items()):
            self._stop(control, "non-finite loss")
        loss = next((value for key, value in logs.items() if key.endswith("/loss")), None)
        if self.loss_spike is None or loss is None:
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        if loss > self.first_loss + self.loss_spike:
            self._stop(control, "spike")

    def report(self, problem: str) -> None:
        """End the round after this step because of a `problem`, which only this rank may have seen."""
        self._report = problem

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.loss_spike is not None:  # only RL rounds have reports, and gathering them costs every step time
            problem = next((report for report in gather_objects(self._report) if report), None)
            if problem:
                self._stop(control, problem)

    def close(self) -> None:
        """Ignore later evaluations: they measure the finished round, and must not change its best weights."""
        self.closed = True

    def ended(self, state: TrainerState) -> bool:
        """Whether the round has no step left to train."""
        return state.global_step >= state.max_steps or self.stop_reason != "finished"

    def _stop(self, control: TrainerControl, reason: str) -> None:
        if self.stop_reason == "finished" and not self.closed:
            best = self.objective.sign * self.best_loss
            LOG.warning("This round ends early (%s); the best %s so far was %.4f", reason, self.objective.key, best)
            self.stop_reason = reason
        control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the guard's files to the Trainer's checkpoint; a checkpoint without the state file is never resumed from.

        The state file is written last, so a kill before leaves no checkpoint that looks complete. A checkpoint at which the
        round has ended gets none, because the Trainer would train one more step from there.
        """
        barrier()  # the other ranks have written their parts of the checkpoint
        if not args.should_save or self.ended(state) or not self.resumable():
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for saved in folder.glob("global_step*"):
            # DeepSpeed writes this file on the first node only, and each node needs it to resume.
            (folder / "latest").write_text(saved.name)
        if self.best is not None:
            save_file(self.best, folder / WEIGHTS_FILE)
        # Names of attributes, which `resume` sets again.
        own = {
            "start": self.start,
            "start_metrics": self.start_metrics,
            "first_loss": self.first_loss,
            "best_loss": self.best_loss,
            "evaluations_without_gain": self.evaluations_without_gain,
            "evaluated_step": self.evaluated_step,
        }
        whose = {"fingerprint": self.fingerprint.sha256, "fingerprint_parts": self.fingerprint.parts}
        temporary = folder / f"{STATE_FILE}.tmp"
        with temporary.open("w") as file:
            json.dump(own | whose, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE_FILE)

    def resume(self, checkpoint: Path) -> None:
        """Restore the state that `on_save` wrote into `checkpoint`."""
        for key, value in json.loads((checkpoint / STATE_FILE).read_text()).items():
            if not key.startswith("fingerprint"):
                setattr(self, key, value)
        if (checkpoint / WEIGHTS_FILE).exists():
            self.best = load_file(checkpoint / WEIGHTS_FILE)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Copy the best weights back into the stack."""
        if self.best is None:
            return
        for name, parameter in self._parameters():
            with gathered([parameter], write=True):
                parameter.copy_(self.best[name])

    @torch.no_grad()
    def _snapshot(self) -> dict[str, Tensor]:
        snapshot = {}
        for name, parameter in self._parameters():
            with gathered([parameter]):
                snapshot[name] = parameter.detach().cpu().clone()
        return snapshot

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.tuner.named_parameters() if f".{self.adapter}." in name]


def evaluation_figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation without their prefix `eval_`, and without timings."""
    timing = ("runtime", "per_second", "steps", "mem", "time", "num_tokens")
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in metrics.items()
        if key.startswith("eval_") and isinstance(value, int | float) and not any(part in key for part in timing)
    }
