"""The trainer that Axolotl sees: its `train()` runs the whole curriculum, with an ordinary trainer for every stage."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from transformers.trainer_utils import TrainOutput

from axolotl_brainstacks.curriculum.preflight import TrainingRun
from axolotl_brainstacks.curriculum.runner import train_curriculum


class Conductor(AxolotlTrainer):
    """Makes no engine itself; each round's trainer makes one."""

    run: TrainingRun

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        train_curriculum(self.run, self.model, self.processing_class)
        return TrainOutput(0, 0.0, {})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`axolotl evaluate` would report one loss, under all stacks together."""
        raise ValueError(
            "`axolotl evaluate` does not know domains; their losses are in the library's report (`axolotl "
            "brainstacks-library LIB list`, `report/report.html`), and lm-eval scores it in routed mode"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Under ZeRO-3 Axolotl saves through the trainer; what is left to save is the reference to the library."""
        if self.is_world_process_zero():
            self.model.save_pretrained(output_dir or self.args.output_dir)


def conductor_class(run: TrainingRun) -> type[Conductor]:
    return type("BrainstacksConductor", (Conductor,), {"run": run})
