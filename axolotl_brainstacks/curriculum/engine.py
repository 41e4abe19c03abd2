"""DDP and DeepSpeed engines: describes a trainer's, builds one for forward passes only, and releases all that one holds.

One process trains many rounds, each with an engine of its own, so that whatever an engine leaves behind would add up.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.integrations import HfDeepSpeedConfig

from axolotl_brainstacks.distributed import sharded

_ZERO3_STATE = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


def describe(trainer: Trainer) -> str:
    """The number of processes and the kind of engine, for the log: a wrong environment can change both silently."""
    engine = trainer.deepspeed
    kind = type(trainer.model_wrapped).__name__
    if engine is not None:
        kind = f"{type(engine).__name__}, ZeRO stage {engine.zero_optimization_stage()}"
    return f"{trainer.accelerator.num_processes} processes, {kind}"


def release(trainer: Trainer) -> None:
    """Destroy the trainer's engine and its hooks, and drop all references that keep the optimiser's memory alive."""
    # `free_memory` makes Accelerate forget the models and the optimiser; the Trainer and its callbacks still refer to them.
    trainer.accelerator.free_memory()
    if trainer.deepspeed is not None:
        _unhook(trainer.deepspeed, trainer.model)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = None
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = None
    handler.train_dataloader = handler.eval_dataloader = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unhook(engine: Any, model: nn.Module) -> None:
    """Remove what DeepSpeed's `destroy` leaves: the engine's hooks on the model, and ZeRO-3's closures in every submodule.

    A closure refers to the engine, and would keep its memory alive.
    """
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()
    for module in model.modules():
        for key in _ZERO3_STATE:
            module.__dict__.pop(key, None)


@contextmanager
def forwards(model: PeftModel, config: str | dict[str, Any] | None) -> Iterator[None]:
    """Let a model compute outside training while the block runs.

    A model that ZeRO-3 loaded in shards needs an engine, which gathers them for each forward. Other models need nothing.

    Args:
        config: the value of `deepspeed:` in the YAML.
    """
    if not sharded(model.parameters()):
        yield
        return
    import deepspeed

    zero = HfDeepSpeedConfig(config).config["zero_optimization"]
    # DeepSpeed does not accept "auto", which only the Trainer fills in, and needs a batch size even without training.
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
    }
    engine = deepspeed.initialize(model=model, config=settings)[0]
    try:
        yield
    finally:
        engine.destroy()
        _unhook(engine, model)
