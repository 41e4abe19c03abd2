"""Adapts TRL's trainers to stacks: the reference policy, fp32 weights, and evaluations that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_brainstacks.curriculum.reward_check import checked
from axolotl_brainstacks.curriculum.rl_checks import ONLINE
from axolotl_brainstacks.distributed import rank, sharded


def prepare_rl(trainer: Trainer, rl: str, seed: int, report: Callable[[str], None]) -> None:
    """Prepare a trainer of TRL for training a stack on top of frozen ones, before its first step.

    Args:
        rl: the kind of RL round.
        seed: the seed for sampling in evaluations.
        report: a function that is called with a description of a reward that is not finite.
    """
    model = trainer.model
    assert isinstance(model, PeftModel)
    if "ref" in model.peft_config:
        # TRL's reference policy is an adapter "ref", a copy of the fresh stack. Without it TRL disables the stack in
        # training instead. This is the same policy, because a fresh stack changes nothing and frozen stacks stay on, and it
        # takes less memory and time.
        model.delete_adapter("ref")
    if not sharded(model.parameters()):
        for parameter in model.parameters():
            if parameter.requires_grad:
                # On a quantised base TRL casts trainable weights to bf16. Supervised rounds train in fp32, so do RL rounds.
                parameter.data = parameter.data.float()
    if rl in ONLINE:
        trainer.reward_funcs = [checked(function, report) for function in trainer.reward_funcs]  # type: ignore[attr-defined]
        # After a bad step logits may be NaN, and sampling from them would crash. With invalid values removed the run goes on
        # to its next log, where the guard sees the non-finite loss and ends the round.
        trainer.generation_config.remove_invalid_values = True  # type: ignore[attr-defined]
        trainer.generation_kwargs["remove_invalid_values"] = True  # type: ignore[attr-defined]
        _evaluate_alike(trainer, seed)
        _shuffle_by_epoch(trainer)


def between_generations(trainer: Trainer) -> bool:
    """Whether the next step generates new completions.

    Only then is a checkpoint complete, because TRL's checkpoints do not hold completions that are still to be trained on.
    """
    every = trainer.args.steps_per_generation * trainer.num_iterations  # type: ignore[attr-defined]
    return bool(trainer._step % every == 0)  # type: ignore[attr-defined]


def _evaluate_alike(trainer: Trainer, seed: int) -> None:
    """Make all evaluations sample with the same random numbers, without changing the random numbers of training.

    The rewards of two evaluations then differ only because the weights do.
    """
    evaluate = trainer.evaluate

    def seeded(*args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed + rank())  # several ranks complete the same prompt, and have to do so differently
            return evaluate(*args, **kwargs)

    setattr(trainer, "evaluate", seeded)  # noqa: B010


class _ShuffleByEpoch(TrainerCallback):
    """Seeds the sampler of training with the number of the epoch that begins."""

    def __init__(self) -> None:
        self.sampler: Any = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run begins in the middle of an epoch.
        epoch = int((state.epoch or 0.0) + 1e-6)
        if generator := getattr(self.sampler, "generator", None):  # a sampler that does not shuffle has none
            generator.manual_seed(args.seed + epoch)


def _shuffle_by_epoch(trainer: Trainer) -> None:
    """Make the order of prompts in an epoch depend on its number alone, so that a resumed run has the same.

    The generator of TRL's sampler goes on from one epoch to the next. After resuming it would start anew, and the Trainer's
    `set_epoch` does not reach it.
    """
    callback, make_sampler = _ShuffleByEpoch(), trainer._get_train_sampler

    def remembered(*args: Any) -> Any:
        callback.sampler = make_sampler(*args)
        return callback.sampler

    setattr(trainer, "_get_train_sampler", remembered)  # noqa: B010
    trainer.add_callback(callback)
