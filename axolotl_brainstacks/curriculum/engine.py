"""Lets go of a stage's trainer and engine, so that nothing of it is left when the next stage builds its own."""

from __future__ import annotations

import gc

import torch
from transformers import Trainer

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
    engine = trainer.deepspeed
    trainer.accelerator.free_memory()
    if engine is not None:
        # `destroy` leaves the hooks on the module, and ZeRO-3's closures over the engine in every submodule.
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            hook = getattr(engine, name, None)
            if hook is not None:
                hook.remove()
        for module in trainer.model.modules():
            for key in _ZERO3_STATE:
                module.__dict__.pop(key, None)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = None
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = None
    handler.train_dataloader = handler.eval_dataloader = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
