"""SIGTERM and SIGINT: finish the step, write a checkpoint, leave. The next run of the same command continues there."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.distributed import gather_objects, world_size

LOG = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds. A cluster's scheduler and the launcher both pass a signal on; that is not a user who has lost patience.
_SAME_WISH = 2.0


class Interruption(TrainerCallback):
    """Remembers a signal until the step ends. A later one ends the process at once, which costs only that step."""

    def __init__(self) -> None:
        self.received = 0
        self._time = math.inf

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now > self._time + _SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._time = min(self._time, now)
        if not self.received:
            self.received = number  # first: where the signal came amid a write, logging may fail
            LOG.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if world_size() > 1:
            # A launcher signals its processes one after another; they have to stop at the same step.
            votes = torch.tensor([self.received], device=args.device)
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            self.received = int(votes)
        if self.received:
            control.should_save = control.should_training_stop = True

    def leave_if_received(self) -> None:
        """Raises SystemExit on every rank, with a shell's status for the signal that any of them received."""
        self.received = max(gather_objects(self.received))
        if self.received:
            raise SystemExit(128 + self.received)
