"""Which experts a token uses: noisy top-k gates and the load balance (Shazeer et al. 2017; paper section 1)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def noisy_logits(logits: Tensor, noise: Tensor) -> Tensor:
    """``l = W_r x + softplus(W_n x) * eps`` with standard normal ``eps``; both inputs (..., experts)."""
    return logits + F.softplus(noise) * torch.randn_like(logits)


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest logits of the last dimension, exactly 0 elsewhere.

    Exactly k gates are non-zero, also when logits tie. Shape and dtype are those of `logits`.
    """
    if k == logits.shape[-1]:
        return logits.softmax(-1)
    values, indices = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, indices, values.softmax(-1))


def expert_use(gates: Tensor, k: int) -> Tensor:
    """Share of the token-to-expert assignments that each expert gets, summing to 1: (..., experts) -> (experts,)."""
    return (gates.detach() != 0).flatten(0, -2).to(torch.float32).mean(0) / k


def balance_loss(logits: Tensor, use: Tensor) -> Tensor:
    """``N * sum_e P(e) f(e)``: 1 when every expert gets an equal share, up to N when one gets all.

    P is the mean probability over the tokens of `logits` (..., N) and carries the gradient; f is `use` (N,).
    """
    probability = logits.softmax(-1).flatten(0, -2).mean(0)
    return logits.shape[-1] * (probability * use).sum()


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.loss_like = loss.dtype, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.loss_like
        return grads[0], torch.full((), ctx.scale, dtype=dtype, device=device), None


def add_loss(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `carrier` unchanged; whenever a gradient flows back through it, ``scale * loss`` is differentiated too.

    The gradient is made in backward, so it survives both kinds of gradient checkpointing, DDP and DeepSpeed, and needs
    nothing from the trainer.
    """
    return _AddLoss.apply(carrier, loss, scale)  # type: ignore[no-untyped-call]
