"""Progress of a round for a person: a line for every evaluation, and on a terminal one more that follows the steps."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub.utils
import transformers.utils.logging
from axolotl.utils.tee import file_only_stream
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from axolotl_brainstacks.curriculum.guard import Guard

# Seconds between two drawings of the line that follows the steps.
_REDRAW = 0.1
_BAR = 20


class Display:
    """Lines that stay, on stdout, and below them on a terminal one that is drawn over and over, on stderr.

    The latter goes past `sys.stderr`, which Axolotl copies into its log file. Where stderr is no terminal, or NO_COLOR asks
    for plain text, it is left out.
    """

    def __init__(self) -> None:
        self.console = Console(file=sys.__stderr__, markup=False, emoji=False, highlight=False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.no_color
        self._drawn = False

    def write(self, line: str) -> None:
        self.clear()
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), flush=True)

    def draw(self, line: str) -> None:
        if self.live:
            self._erase()
            # One column is left free: a cursor beyond the last one would begin a new line in some terminals.
            text = Text(line, no_wrap=True, overflow="ellipsis")
            text.truncate(self.console.width - 1, overflow="ellipsis")
            self.console.print(text, end="")
            self._drawn = True

    def clear(self) -> None:
        if self._drawn:
            self._erase()
            self._drawn = False

    def _erase(self) -> None:
        self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


class _Log(logging.Filter):
    """Lets a log record clear the line that is drawn; drops what Axolotl's trainers say at every evaluation and checkpoint.

    The latter stays in Axolotl's log file, which has handlers of its own.
    """

    def __init__(self, display: Display, everything: bool) -> None:
        super().__init__()
        self.display, self.everything = display, everything

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.everything and record.levelno <= logging.INFO and record.name.startswith("axolotl.core.trainers"):
            return False
        self.display.clear()
        return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the log's handlers of the terminal have this filter."""
        handlers = [
            handler
            for logger in (logging.getLogger(), logging.getLogger("axolotl"))
            for handler in logger.handlers
            if getattr(handler, "stream", None) is not file_only_stream
        ]
        for handler in handlers:
            handler.addFilter(self)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self)


class Progress(TrainerCallback):
    """Says how a round goes, on the main process alone.

    Args:
        title: what trains, such as ``math 1/2``.
        guard: has to come before it among the trainer's callbacks, and knows the best so far.
        everything: print all metrics that reporters get, and leave nothing out of the log.
    """

    def __init__(self, title: str, guard: Guard, everything: bool = False) -> None:
        self.title, self.guard, self.everything = title, guard, everything
        self.measure = guard.objective.key.removeprefix("eval_")
        self.display = Display()
        self.training: float | None = None
        self._begun, self._first_step, self._drawn = time.monotonic(), 0, 0.0

    def attach(self, trainer: Trainer) -> None:
        """Take the place of the Trainer's own bar and of the dictionaries that it prints."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.add_callback(self)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While inside, the log and the line that follows the steps keep out of each other's way; afterwards it is gone."""
        with _Log(self.display, self.everything).watching(), warnings.catch_warnings():
            # Once an evaluation, on every machine without a GPU.
            warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
            try:
                yield
            finally:
                self.display.clear()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if self.display.live and state.is_world_process_zero and now > self._drawn + _REDRAW:
            self._drawn = now
            best = f"best {self._best:.3f}" if self.guard.best is not None else ""
            self.display.draw(_joined([_bar(state), *self._place(state), best, self._left(state)]))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        ending = f"/{self.measure}"  # the metrics carry domain and round
        self.training = next((value for key, value in logs.items() if key.endswith(ending)), self.training)
        if self.everything and state.is_world_process_zero:
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in logs.items()}
            self.display.write(str(shown))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        value = kwargs["metrics"].get(self.guard.objective.key)
        if self.guard.closed or value is None or not state.is_world_process_zero:
            return
        if not state.global_step:
            note = "start"
        elif self.guard.evaluations_without_gain:
            note = f"best {self._best:.3f}"
        else:
            note = "best"
        self.display.write(
            _joined([*self._place(state), f"validation {self.measure} {value:.3f} ({note})", self._left(state)])
        )

    @property
    def _best(self) -> float:
        return self.guard.objective.sign * self.guard.best_loss

    def _place(self, state: TrainerState) -> list[str]:
        training = "" if self.training is None else f"{self.measure} {self.training:.3f}"
        return [self.title, f"step {state.global_step}/{state.max_steps}", training]

    def _left(self, state: TrainerState) -> str:
        """How long this round still takes at the pace so far, its evaluations included."""
        done, to_do = state.global_step - self._first_step, state.max_steps - state.global_step
        if done <= 0 or to_do <= 0:
            return ""
        return f"{duration((time.monotonic() - self._begun) / done * to_do)} left"


def duration(seconds: float) -> str:
    """As a person says it, such as ``40 s``, ``3 min`` or ``1 h 20 min``."""
    if seconds < 60:
        return f"{max(round(seconds), 1)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def bars_for_terminals_only() -> None:
    """Libraries draw bars while they load data and weights; into a file or a pipe they draw none from now on."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _joined(parts: list[str]) -> str:
    return " · ".join(part for part in parts if part)


def _bar(state: TrainerState) -> str:
    full = _BAR * state.global_step // max(state.max_steps, 1)
    return "━" * full + "─" * (_BAR - full)
