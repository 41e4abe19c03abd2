"""What differs when a round's trainer comes from TRL: the reference policy, fp32, evaluations that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from axolotl_brainstacks.curriculum.reward_check import checked
from axolotl_brainstacks.curriculum.rl_checks import ONLINE
from axolotl_brainstacks.distributed import rank, sharded


def prepare_rl(trainer: Trainer, rl: str, seed: int, report: Callable[[str], None]) -> None:
    """Fit a trainer of TRL's to a stack on frozen ones, before its first step.

    Args:
        report: is told of a reward that is not finite.
    """
    model = trainer.model
    assert isinstance(model, PeftModel)
    if "ref" in model.peft_config:
        # TRL's reference policy is a copy of the fresh stack. Without it TRL switches the stack in training off, which is
        # the same policy, since frozen stacks stay on, for less memory and less time.
        model.delete_adapter("ref")
    if not sharded(model.parameters()):
        for parameter in model.parameters():
            if parameter.requires_grad:
                # TRL makes them bf16 on a quantised base; a supervised round trains them in fp32.
                parameter.data = parameter.data.float()
    if rl in ONLINE:
        trainer.reward_funcs = [checked(function, report) for function in trainer.reward_funcs]  # type: ignore[attr-defined]
        # Sampling from the logits of spoilt weights would crash. The loss is not finite then, and the guard ends the round.
        trainer.generation_config.remove_invalid_values = True  # type: ignore[attr-defined]
        trainer.generation_kwargs["remove_invalid_values"] = True  # type: ignore[attr-defined]
        _evaluate_alike(trainer, seed)


def between_generations(trainer: Trainer) -> bool:
    """Whether the answers generated last have been used up: no checkpoint of TRL's holds them."""
    every = trainer.args.steps_per_generation * trainer.num_iterations  # type: ignore[attr-defined]
    return bool(trainer._step % every == 0)  # type: ignore[attr-defined]


def _evaluate_alike(trainer: Trainer, seed: int) -> None:
    """Have all evaluations sample with the same random numbers, so that their rewards differ by the weights alone, and have
    none of them change what training samples."""
    evaluate = trainer.evaluate

    def seeded(*args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed + rank())  # the same prompt is answered on several ranks
            return evaluate(*args, **kwargs)

    setattr(trainer, "evaluate", seeded)  # noqa: B010
