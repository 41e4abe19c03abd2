"""The trainer that Axolotl sees: its `train()` runs the whole curriculum, with an ordinary trainer for every round."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from transformers.trainer_utils import TrainOutput

from axolotl_brainstacks.curriculum.preflight import TrainingRun
from axolotl_brainstacks.curriculum.runner import train_curriculum


class Conductor(AxolotlTrainer):
    """A trainer whose `train` trains all domains of a run. It builds no DDP or DeepSpeed engine; each round's trainer does."""

    run: TrainingRun

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train all domains; arguments are those of `Trainer.train`, and are not used."""
        train_curriculum(self.run, self.model, self.processing_class)
        # Axolotl logs this and saves the model; steps and losses are in the library's records of rounds.
        return TrainOutput(0, 0.0, {})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Raises ValueError, because `axolotl evaluate` would report one loss, with all stacks on."""
        raise ValueError(
            "`axolotl evaluate` does not know domains; their losses are in the library's report (`axolotl "
            "brainstacks-library LIB list`, `report/report.html`), and lm-eval scores it in routed mode"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the reference to the library; its stacks are on disk already. Axolotl calls this under ZeRO-3."""
        if self.is_world_process_zero():
            self.model.save_pretrained(output_dir or self.args.output_dir)


def conductor_class(run: TrainingRun) -> type[Conductor]:
    """A subclass that carries the run, because Axolotl asks plugins for a trainer class and makes the object itself."""
    return type("BrainstacksConductor", (Conductor,), {"run": run})
