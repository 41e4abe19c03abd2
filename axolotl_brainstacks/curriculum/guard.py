"""Keeps the best weights of a round and ends rounds that went wrong (paper section 1, best-weights guard)."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.adapter.model import BrainstacksModel
from axolotl_brainstacks.args import BoostingArgs
from axolotl_brainstacks.distributed import barrier, gather_objects, gathered

LOG = get_logger(__name__)

STATE_FILE = "brainstacks_guard.json"
WEIGHTS_FILE = "brainstacks_best.safetensors"


class Guard(TrainerCallback):
    """Snapshots the stack at every gain of the validation loss; stops on a spike, a non-finite loss, or no gain.

    Decisions follow from losses that the trainer has gathered over all ranks, so every rank takes the same ones.
    """

    def __init__(self, tuner: BrainstacksModel, adapter: str, rules: BoostingArgs, fingerprint: str = "") -> None:
        self.tuner, self.adapter, self.rules, self.fingerprint = tuner, adapter, rules, fingerprint
        self.best_loss = math.inf
        self.best: dict[str, Tensor] | None = None
        self.evaluations_without_gain = 0
        self.evaluated_step = -1
        self.stop_reason = "finished"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"].get("eval_loss", math.nan)
        self.evaluated_step = state.global_step
        if loss < self.best_loss:
            self.best_loss, self.best, self.evaluations_without_gain = loss, self._snapshot(), 0
            return
        self.evaluations_without_gain += 1
        if not math.isfinite(loss):
            self._stop(control, "non-finite loss")
        elif loss > self.best_loss + self.rules.spike_threshold:
            self._stop(control, "spike")
        elif self.evaluations_without_gain >= self.rules.patience:
            self._stop(control, "patience")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # With fp16 an infinite gradient is routine: the step is skipped and the loss scale halved.
        endings = ("/loss",) if args.fp16 else ("/loss", "/grad_norm")
        watched = [value for key, value in kwargs["logs"].items() if f"/{key}".endswith(endings)]
        if not all(math.isfinite(value) for value in watched if isinstance(value, float)):
            self._stop(control, "non-finite loss")

    def ended(self, state: TrainerState) -> bool:
        """Whether the round has trained all it will."""
        return state.global_step >= state.max_steps or self.stop_reason != "finished"

    def _stop(self, control: TrainerControl, reason: str) -> None:
        LOG.warning("This round ends early (%s); the best validation loss so far was %.4f", reason, self.best_loss)
        self.stop_reason = reason
        control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint; the state file comes last, and without it the checkpoint does not count.

        The Trainer would train one more step from a checkpoint at which the round has ended, so that one never counts.
        """
        barrier()  # what the other ranks write of it is there
        if not args.should_save or self.ended(state):
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        # TRL's copy of the fresh stack for DPO; beside it the Trainer would not load the stack itself.
        shutil.rmtree(folder / "ref", ignore_errors=True)
        for saved in folder.glob("global_step*"):
            (folder / "latest").write_text(saved.name)  # DeepSpeed writes it on the first node alone
        if self.best is not None:
            save_file(self.best, folder / WEIGHTS_FILE)
        own = {
            "fingerprint": self.fingerprint,
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
        """Give the stack its best weights back; without any evaluation the last ones stay."""
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
