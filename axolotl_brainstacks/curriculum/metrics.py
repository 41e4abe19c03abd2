"""Names a stage's metrics after its domain and round, and adds the gates' own."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.adapter.tuner import StackTuner


def name_metrics(trainer: Trainer, tuner: StackTuner, domain: str, round_number: int) -> None:
    """Let the progress bar, wandb, tensorboard and all other callbacks of `trainer` see `<domain>/round<n>/<metric>`.

    Done where the handler hands logs to callbacks: the trainer itself goes on working with the plain names.
    """
    handler, prefix = trainer.callback_handler, f"{domain}/round{round_number}/"
    hand_over = handler.on_log

    def on_log(
        args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float]
    ) -> TrainerControl:
        named = logs | (gate_metrics(tuner) if "loss" in logs else {})
        return hand_over(
            args, state, control, {key if key == "epoch" else prefix + key: value for key, value in named.items()}
        )

    setattr(handler, "on_log", on_log)  # noqa: B010
    for layer in tuner.brainstacks_layers():
        layer.balance_scale = 1.0 / trainer.args.gradient_accumulation_steps
        layer.statistics = None


def gate_metrics(tuner: StackTuner) -> dict[str, float]:
    """Load balance since the last call: mean loss (top_k is perfect), and the least and most used expert of any projection."""
    counters = [layer.statistics for layer in tuner.brainstacks_layers() if layer.statistics is not None]
    if not counters:
        return {}
    sums = torch.stack([counter.cpu() for counter in counters])
    for counter in counters:
        counter.zero_()
    sums = sums[sums[:, -1] > 0]
    if not len(sums):
        return {}
    table = sums[:, :-1] / sums[:, -1:]
    return {
        "balance_loss": float(table[:, -1].mean()),
        "expert_use_min": float(table[:, :-1].min()),
        "expert_use_max": float(table[:, :-1].max()),
    }
