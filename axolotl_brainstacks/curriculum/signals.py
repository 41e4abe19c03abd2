"""Handles SIGTERM and SIGINT: the step is finished, a checkpoint is written, and the process ends.

The next run of the same command resumes from that checkpoint.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.distributed import gather_objects, world_size
from axolotl_brainstacks.guarded import printable

LOG = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which further signals count as the first one: a cluster's scheduler and the launcher may both pass it on.
_SAME_REQUEST = 2.0


class Interruption(TrainerCallback):
    """Remembers a signal until the training step ends. A second one ends the process at once, without a checkpoint."""

    def __init__(self) -> None:
        self.received = 0
        self._time = math.inf
        self._announced = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle both signals while the block runs.

        Raises SystemExit for an exception that follows a signal: where the signal went to the whole process group, it may
        have ended a process that the block needs, such as one that tokenises a dataset.
        """
        before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        try:
            yield
        except Exception as error:
            if not self.received:
                raise
            LOG.warning(
                "Stopped, with an error that the signal may have caused (%s). The same command resumes from the last complete "
                "checkpoint, or begins the round again",
                printable(repr(error)),
            )
            raise SystemExit(128 + self.received) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now > self._time + _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._time = min(self._time, now)
        if not self.received:
            # Set before logging: logging raises an error if the signal interrupted a write to the same stream.
            self.received = number
            self._announce()

    def _announce(self) -> None:
        """Say once, on the main process alone, that training stops."""
        if not self._announced:
            self._announced = True
            LOG.warning("%s: stopping after this step, with a checkpoint", signal.Signals(self.received).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training with a checkpoint if any rank has received a signal."""
        if world_size() > 1:
            # A launcher signals its processes one after another, but all of them have to stop at the same step.
            votes = torch.tensor([self.received], device=args.device)
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            self.received = int(votes)
        if self.received:
            self._announce()  # the signal may have come to another rank only
            control.should_save = control.should_training_stop = True

    def leave_if_received(self, farewell: Callable[[], str]) -> None:
        """Raises SystemExit on every rank if any rank received a signal; the status is 128 + its number, as in a shell.

        Args:
            farewell: called on every rank before; what it returns is the last line that the user sees.
        """
        self.received = max(gather_objects(self.received))
        if self.received:
            LOG.warning("Stopped. %s", farewell())
            raise SystemExit(128 + self.received)
