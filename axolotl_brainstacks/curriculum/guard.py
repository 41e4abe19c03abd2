"""Keeps the best weights of a round and ends rounds that went wrong (arXiv 2604.01152, best-weights guard)."""

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
from axolotl_brainstacks.distributed import barrier, gather_objects, gathered

LOG = get_logger(__name__)

STATE_FILE = "brainstacks_guard.json"
WEIGHTS_FILE = "brainstacks_best.safetensors"


@dataclass(frozen=True)
class Objective:
    """What a round improves on held-out rows, as the trainer's evaluation reports it.

    sign: 1 for a loss, -1 for a reward. worst_rise: end the round when ``sign * value`` exceeds its best, or with
    `from_start` its start, by this.
    """

    key: str = "eval_loss"
    sign: int = 1
    worst_rise: float = 0.1
    from_start: bool = False
    reason: str = "spike"


class Guard(TrainerCallback):
    """Snapshots the stack at every gain of the objective; stops on a spike, a non-finite value, or no gain.

    The first evaluation comes before the first step, so that a round which only ever makes things worse gets its start
    back: the identity. Decisions follow from what the trainer has gathered over all ranks, so every rank takes the same
    ones.

    Args:
        loss_spike: for RL rounds, stop when a logged training loss exceeds the first one by this; None: never.
    """

    def __init__(
        self,
        tuner: StackTuner,
        adapter: str,
        patience: int,
        objective: Objective,
        loss_spike: float | None = None,
        fingerprint: str = "",
    ) -> None:
        self.tuner, self.adapter, self.patience, self.objective = tuner, adapter, patience, objective
        self.loss_spike, self.fingerprint = loss_spike, fingerprint
        self.start: float | None = None  # of the objective, with its sign
        self.start_metrics: dict[str, float] = {}
        self.first_loss: float | None = None
        self.best_loss = math.inf
        self.best: dict[str, Tensor] | None = None
        self.evaluations_without_gain = 0
        self.evaluated_step = -1
        self.stop_reason = "finished"
        self.closed = False
        # Whether a checkpoint written now holds all that the next step needs.
        self.resumable: Callable[[], bool] = lambda: True
        self._report: str | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.closed:
            return
        metrics = kwargs["metrics"]
        value = metrics.get(self.objective.key)
        loss = math.nan if value is None else self.objective.sign * value
        self.evaluated_step = state.global_step
        if self.start is None:
            self.start, self.start_metrics = loss, evaluation_figures(metrics)
        if loss < self.best_loss:
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
        """Have the round end after this step, because of a `problem` that perhaps only this rank has seen."""
        self._report = problem

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.loss_spike is not None:  # in RL rounds, where alone reports come
            problem = next((report for report in gather_objects(self._report) if report), None)
            if problem:
                self._stop(control, problem)

    def close(self) -> None:
        """What is evaluated from here on judges the round, and changes nothing about how it went."""
        self.closed = True

    def ended(self, state: TrainerState) -> bool:
        """Whether the round has trained all it will."""
        return state.global_step >= state.max_steps or self.stop_reason != "finished"

    def _stop(self, control: TrainerControl, reason: str) -> None:
        if self.stop_reason == "finished" and not self.closed:
            best = self.objective.sign * self.best_loss
            LOG.warning("This round ends early (%s); the best %s so far was %.4f", reason, self.objective.key, best)
            self.stop_reason = reason
        control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint; the state file comes last, and without it the checkpoint does not count.

        The Trainer would train one more step from a checkpoint at which the round has ended, so that one never counts.
        """
        barrier()  # what the other ranks write of it is there
        if not args.should_save or self.ended(state) or not self.resumable():
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for saved in folder.glob("global_step*"):
            (folder / "latest").write_text(saved.name)  # DeepSpeed writes it on the first node alone
        if self.best is not None:
            save_file(self.best, folder / WEIGHTS_FILE)
        own = {
            "fingerprint": self.fingerprint,
            "start": self.start,
            "start_metrics": self.start_metrics,
            "first_loss": self.first_loss,
            "best_loss": self.best_loss,
            "evaluations_without_gain": self.evaluations_without_gain,
            "evaluated_step": self.evaluated_step,
        }
        temporary = folder / f"{STATE_FILE}.tmp"
        with temporary.open("w") as file:
            json.dump(own, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE_FILE)

    def resume(self, checkpoint: Path) -> None:
        """Continue from what `on_save` wrote into `checkpoint`."""
        for key, value in json.loads((checkpoint / STATE_FILE).read_text()).items():
            setattr(self, key, value)
        if (checkpoint / WEIGHTS_FILE).exists():
            self.best = load_file(checkpoint / WEIGHTS_FILE)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the stack its best weights back."""
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
    """What an evaluation says about the model, without the `eval_` before it and without how long it took."""
    timing = ("runtime", "per_second", "steps", "mem", "time", "num_tokens")
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in metrics.items()
        if key.startswith("eval_") and isinstance(value, int | float) and not any(part in key for part in timing)
    }


def last_complete_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The newest checkpoint of this stage that was written to its end, wherever ranks keep their parts of it, or None."""
    states = {path: json.loads(path.read_text()) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")}
    mine = {
        int(path.parent.name.rpartition("-")[2])
        for path, state in states.items()
        if state.get("fingerprint") == fingerprint
    }
    if len(mine) < len(states):
        LOG.warning("Checkpoints in %s are of another library, config or data, and are not resumed from", folder)
    complete = set.intersection(*gather_objects(mine))
    return folder / f"checkpoint-{max(complete)}" if complete else None
