"""Engines: what runs, one for forwards alone, and letting go of one so that nothing is left when the next is built."""

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
    """One line for the log: what really runs, which a wrong environment can silently change."""
    engine = trainer.deepspeed
    kind = type(trainer.model_wrapped).__name__
    if engine is not None:
        kind = f"{type(engine).__name__}, ZeRO stage {engine.zero_optimization_stage()}"
    return f"{trainer.accelerator.num_processes} processes, {kind}"


def release(trainer: Trainer) -> None:
    """Destroy the engine, its hooks, and all references that keep the optimiser's memory alive."""
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
    """`destroy` leaves the engine's hooks on the module, and ZeRO-3's closures over the engine in every submodule."""
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()
    for module in model.modules():
        for key in _ZERO3_STATE:
            module.__dict__.pop(key, None)


@contextmanager
def forwards(model: PeftModel, config: str | dict[str, Any] | None) -> Iterator[None]:
    """Let a model compute outside training: where ZeRO-3 loaded it in shards, only an engine gathers them.

    Args:
        config: the YAML's `deepspeed:`.
    """
    if not sharded(model.parameters()):
        yield
        return
    import deepspeed

    zero = HfDeepSpeedConfig(config).config["zero_optimization"]
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
