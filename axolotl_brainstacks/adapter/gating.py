"""Expert gates: which experts a token uses (noisy top-k, Shazeer et al. 2017) and the load-balance loss that keeps all
experts in use (arXiv 2604.01152, MoE-LoRA building block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gating:
    """How `gated` reads the output of a stack's A-side matmul, and what it does with it.

    The last dimension of that output holds, per stack, n gate logits, then n noise scales if `noise_rows`, then the rank-space
    activations of n experts, r each.

    Attributes:
        n: number of experts.
        r: rank of each expert.
        k: experts that a token uses.
        scaling: factor on the gated activations.
        noise_rows: whether the noise scales are there; frozen stacks are kept without them.
        noisy: whether to add noise to the gate logits, as in training; needs `noise_rows`.
        balance: weight of the load-balance loss, whose gradient is added in backward; None: no loss and no counts.
    """

    n: int
    r: int
    k: int
    scaling: float
    noise_rows: bool = False
    noisy: bool = False
    balance: float | None = None

    @property
    def first_rank(self) -> int:
        """Where the experts' activations start."""
        return self.n * (2 if self.noise_rows else 1)


@dataclass
class BatchTokens:
    """State of the current batch that all layers of a model share.

    Attributes:
        share: (rows, tokens, 1, 1), fp32, weight of each token in the load-balance loss: 0 at padding, summing to 1. None: all
            tokens weigh the same.
        frozen_only: whether the stacks in training are off in all layers.
    """

    share: Tensor | None = None
    frozen_only: bool = False

    def set_mask(self, mask: Tensor | None) -> None:
        """Set `share` from an attention mask (rows, tokens), 0 at padding.

        A mask of another shape, such as a 4-D one, does not tell which tokens are padding.
        """
        self.share = None
        if mask is not None and mask.dim() == 2:
            real = mask.ne(0).float()
            self.share = (real / real.sum())[..., None, None]

    def share_of(self, x: Tensor) -> Tensor | None:
        """`share` on the device of `x` (..., features), or None unless `x` has this batch's rows and tokens."""
        return self.share.to(x.device) if self.share is not None and self.share.shape[:-2] == x.shape[:-1] else None


def top_k_gates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the k largest logits of the last dimension, and exactly 0 elsewhere.

    Args:
        logits: (..., n).
        k: number of entries to keep; exactly k are kept, also when logits tie.

    Returns:
        The gates (..., n) in the dtype of `logits`, and the indices of the k chosen entries (..., k), int64.
    """
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1)), chosen


def gated(
    h: Tensor, gating: Gating, weights: Tensor | None = None, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply each expert's rank-space activations by its gate, and count how evenly the experts are used.

    This is one autograd node with a hand-written backward, for two reasons. The tensors are so small that the number of
    kernel launches sets the time. And the backward adds the gradient of the load-balance loss itself, so the trainer need not
    add a loss term, and both kinds of gradient checkpointing, DDP and DeepSpeed keep it. No activation is saved except the
    output z.

    Args:
        h: (..., stacks, features), features as `Gating` describes.
        weights: factors on the gates, broadcast over (..., stacks, n); they get no gradient.
        share: weight of each token in the load-balance loss, broadcast over (..., stacks, n), summing to 1; None: all tokens
            weigh the same.

    Returns:
        z (..., stacks * n * r) in the dtype of `h`, and counts (n + 2,): each expert's share of the assignments, the balance
        loss (k when all experts are used equally, up to n when k experts get every token), and 1, so that a sum of counts
        also counts the forwards. Without `gating.balance`, counts is empty.
    """
    if torch.is_grad_enabled() and h.requires_grad:
        z, counts = _Gated.apply(h, gating, weights, share)  # type: ignore[no-untyped-call]
        return z, counts
    z, counts, _ = _gate(h, gating, weights, share)
    return z, counts


def matmul(x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
    """``linear(x, matrix)`` with matrix (out, in); with `y`, ``y + x @ matrix`` with matrix (in, out)."""
    return F.linear(x, matrix) if y is None else multiply_add(y, x, matrix)


def multiply_add(y: Tensor, z: Tensor, matrix: Tensor) -> Tensor:
    """``y + z @ matrix``.

    Args:
        y: (..., out).
        z: (..., ranks).
        matrix: (ranks, out).

    Returns:
        (..., out) in the dtype of `y`.
    """
    if y.dtype != z.dtype or torch.is_autocast_enabled(y.device.type):
        return y + (z @ matrix).to(y.dtype)
    # addmm reads and writes y once. It takes 2-D tensors only, and y may have any number of leading dimensions, even none.
    flat_y = y.reshape(-1, y.shape[-1])
    flat_z = z.reshape(-1, z.shape[-1])
    return torch.addmm(flat_y, flat_z, matrix).view(y.shape)


def _gate(
    h: Tensor, gating: Gating, weights: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """What `gated` returns, and the tensors that its backward needs besides z."""
    logits, scale, noise = _noisy_logits(h, gating)  # (..., stacks, n) each
    gates, chosen = top_k_gates(logits, gating.k)  # (..., stacks, n), (..., stacks, k)
    factors = gates * gating.scaling
    if weights is not None:
        factors = factors * weights
    activations = h[..., gating.first_rank :].unflatten(-1, (gating.n, gating.r))  # (..., stacks, n, r)
    z = (activations * factors.unsqueeze(-1)).to(h.dtype)
    counts = logits.new_empty(0)
    probabilities = use = None
    if gating.balance is not None:
        if share is None:
            share = logits.new_full((), gating.n / logits.numel())  # 1 / (tokens * stacks)
        counts, probabilities, use = _load_balance(logits, chosen, share, gating)
    return z.flatten(-3), counts, (gates, factors, scale, noise, probabilities, use, share)


def _noisy_logits(h: Tensor, gating: Gating) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gate logits, at least in fp32, with noise of a learned scale if `gating.noisy`; then that scale and the noise."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    logits = h[..., : gating.n].to(dtype)
    if not gating.noisy:
        return logits, None, None
    scale = h[..., gating.n : 2 * gating.n].to(dtype)
    noise = torch.randn_like(logits)
    return torch.addcmul(logits, F.softplus(scale), noise), scale, noise


def _load_balance(logits: Tensor, chosen: Tensor, share: Tensor, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    """The balance loss ``n k sum_e P_e f_e`` and its parts.

    P_e is the tokens' mean softmax probability of expert e, f_e its share of the assignments.

    Returns:
        counts (n + 2,) as `gated` returns them, the probabilities (..., stacks, n), and f (n,).
    """
    probabilities = logits.softmax(-1)
    kept = torch.zeros_like(logits).scatter_(-1, chosen, 1.0)  # (..., stacks, n), 1 where a token uses an expert
    use = (kept * share).flatten(0, -2).sum(0) / gating.k
    mean_probabilities = (probabilities * share).flatten(0, -2).sum(0)
    loss = gating.n * gating.k * (mean_probabilities * use).sum()
    return torch.cat([use, loss.view(1), loss.new_ones(1)]), probabilities, use


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, gating: Gating, weights: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z, counts, saved = _gate(h, gating, weights, share)
        ctx.gating = gating
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(z, *saved)
        return z, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        gating: Gating = ctx.gating
        z, gates, factors, scale, noise, probabilities, use, share = ctx.saved_tensors
        grad = grad.view(*gates.shape, gating.r)  # (..., stacks, n, r)
        grad_logits = _gate_grad(grad, z.view(grad.shape), gates)  # (..., stacks, n)
        if gating.balance is not None:
            grad_logits += _balance_grad(probabilities, use, share, gating, gating.balance)
        parts = [grad_logits]
        if gating.noise_rows:
            # logit = h_gate + softplus(scale) * noise, and the derivative of softplus is the sigmoid.
            parts.append(grad_logits * noise * scale.sigmoid() if gating.noisy else torch.zeros_like(grad_logits))
        parts.append((grad * factors.unsqueeze(-1)).flatten(-2))  # (..., stacks, n * r)
        return torch.cat(parts, dim=-1).to(grad.dtype), None, None, None


def _gate_grad(grad: Tensor, z: Tensor, gates: Tensor) -> Tensor:
    """The logits' gradient through the top-k softmax, (..., stacks, n), for `grad` and `z` (..., stacks, n, r).

    The softmax's backward needs gate * d/d(gate). As z = gate * factor * activation, that is <grad, z>, so the activations
    need not be saved. It is 0 where an expert was not chosen.
    """
    grad_dot_gate = (grad.to(gates.dtype) * z).sum(-1)
    return grad_dot_gate - gates * grad_dot_gate.sum(-1, keepdim=True)


def _balance_grad(probabilities: Tensor, use: Tensor, share: Tensor, gating: Gating, weight: float) -> Tensor:
    """The logits' gradient of the weighted balance loss, (..., stacks, n); f (`use`) is a count and has no gradient."""
    weighted_probs = probabilities * use
    through_softmax = weighted_probs - probabilities * weighted_probs.sum(-1, keepdim=True)
    return through_softmax * (share * (weight * gating.n * gating.k))
