"""SIGTERM and SIGINT: finish the step, write a checkpoint, leave. The next run of the same command continues there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.distributed import sum_over_ranks, world

LOG = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(TrainerCallback):
    """Remembers a signal until the step ends. A second one ends the process at once, which costs only that step."""

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        LOG.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if world()[1] > 1:
            # A launcher signals its processes one after another; they have to stop at the same step.
            votes = torch.tensor([self.received], device=args.device)
            self.received = int(sum_over_ranks(votes).clamp(max=int(max(_SIGNALS))))
        if self.received:
            control.should_save = control.should_training_stop = True

    def leave_if_received(self) -> None:
        """Raises SystemExit with a shell's status for the signal."""
        if self.received:
            raise SystemExit(128 + self.received)
