"""Which experts a token uses: noisy top-k gates and the load balance (Shazeer et al. 2017; arXiv 2604.01152)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gating:
    """How the rows of an A-side matmul are read: per stack n gate logits, n noise scales if `noisy_rows`, n experts of r.

    scaling: of the gated activations. noisy: draw noise (training). balance: weight of the load-balance loss, whose
    gradient is made in backward; None where nothing is to be counted.
    """

    n: int
    r: int
    k: int
    scaling: float
    noise_rows: bool = False
    noisy: bool = False
    balance: float | None = None


@dataclass
class BatchTokens:
    """What all layers of a model share: the tokens of the batch under way, and whether trained stacks compute.

    share: (rows, tokens, 1, 1), what each token counts in the load balance: padding nothing; None: all alike.
    frozen_only: stacks in training are off, all at once.
    """

    share: Tensor | None = None
    frozen_only: bool = False

    def set_mask(self, mask: Tensor | None) -> None:
        """Take in an attention mask (rows, tokens), 0 at padding; masks of other shapes say nothing about tokens."""
        self.share = None
        if mask is not None and mask.dim() == 2:
            real = mask.ne(0).float()
            self.share = (real / real.sum())[..., None, None]

    def share_of(self, x: Tensor) -> Tensor | None:
        """The tokens' shares if `x` (..., features) holds the tokens of this batch."""
        return self.share.to(x.device) if self.share is not None and self.share.shape[:-2] == x.shape[:-1] else None


def top_k_gates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the k largest logits of the last dimension, exactly 0 elsewhere; and where those k are.

    Exactly k are chosen, also when logits tie. Shape and dtype of the gates are those of `logits`.
    """
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1)), chosen


def gated(
    h: Tensor, gating: Gating, weights: Tensor | None = None, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated, scaled rank-space activations, and what the load balance is about.

    One autograd node with a backward of its own, because the tensors are so small that the number of operations is
    what counts. It saves no copy of the activations besides its own output, and it makes the load-balance gradient
    there and then: so that needs nothing from the trainer, and survives both kinds of gradient checkpointing, DDP and
    DeepSpeed.

    Args:
        h: (..., stacks, rows), rows as `Gating` says.
        weights: factors of the gates, broadcast over (..., stacks, n); without a gradient of their own.
        share: what each token counts in the load balance, broadcast over (..., stacks, n), summing to 1; None: alike.

    Returns:
        z (..., stacks * n * r), and counts (n + 2): each expert's share of the assignments, the balance loss
        (k when all are used alike, up to n when k get everything), and 1; empty without `gating.balance`.
    """
    if torch.is_grad_enabled() and h.requires_grad:
        z, counts = _Gated.apply(h, gating, weights, share)  # type: ignore[no-untyped-call]
        return z, counts
    z, counts, _ = _gate(h, gating, weights, share)
    return z, counts


def matmul(x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
    """``linear(x, matrix)``, or ``y + x @ matrix`` for a given `y`."""
    return F.linear(x, matrix) if y is None else multiply_add(y, x, matrix)


def multiply_add(y: Tensor, z: Tensor, matrix: Tensor) -> Tensor:
    """``y + z @ matrix`` in the dtype of `y` (..., out), in one pass over it where the dtypes agree: matrix (ranks, out)."""
    if y.dtype != z.dtype or torch.is_autocast_enabled(y.device.type):
        return y + (z @ matrix).to(y.dtype)
    rows, ranks = (
        y.reshape(-1, y.shape[-1]),
        z.reshape(-1, z.shape[-1]),
    )  # one token may come without a dimension for it
    return torch.addmm(rows, ranks, matrix).view(y.shape)


def _gate(
    h: Tensor, gating: Gating, weights: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """What `gated` returns, and what its backward needs besides z."""
    n, lead = gating.n, gating.n * (2 if gating.noise_rows else 1)
    wide = torch.promote_types(h.dtype, torch.float32)
    logits = h[..., :n].to(wide)
    noise = scale = None
    if gating.noisy:
        scale = h[..., n : 2 * n].to(wide)
        noise = torch.randn_like(logits)
        logits = torch.addcmul(logits, F.softplus(scale), noise)
    gates, chosen = top_k_gates(logits, gating.k)
    factors = gates * gating.scaling
    if weights is not None:
        factors = factors * weights
    z = (h[..., lead:].unflatten(-1, (n, gating.r)) * factors.unsqueeze(-1)).to(h.dtype)
    counts = logits.new_empty(0)
    probabilities = use = None
    if gating.balance is not None:
        probabilities = logits.softmax(-1)
        if share is None:
            share = logits.new_full((), n / logits.numel())
        kept = torch.zeros_like(logits).scatter_(-1, chosen, 1.0)
        use = (kept * share).flatten(0, -2).sum(0) / gating.k
        loss = n * gating.k * ((probabilities * share).flatten(0, -2).sum(0) * use).sum()
        counts = torch.cat([use, loss.view(1), loss.new_ones(1)])
    return z.flatten(-3), counts, (gates, factors, scale, noise, probabilities, use, share)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, gating: Gating, weights: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z, counts, kept = _gate(h, gating, weights, share)
        ctx.gating = gating
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(z, *kept)
        return z, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        z, gates, factors, scale, noise, probabilities, use, share = ctx.saved_tensors
        gating: Gating = ctx.gating
        shape = (*gates.shape, gating.r)
        grad = grad.view(shape)
        # With z = gate * factor * activation, gate * d/d(gate) is <grad, z>: the softmax's backward needs just that.
        grad_dot_gate = (grad.to(gates.dtype) * z.view(shape)).sum(-1)
        grad_logits = grad_dot_gate - gates * grad_dot_gate.sum(-1, keepdim=True)
        if gating.balance is not None:
            weighted_probs = probabilities * use
            grad_logits += (weighted_probs - probabilities * weighted_probs.sum(-1, keepdim=True)) * (
                share * (gating.balance * gating.n * gating.k)
            )
        grad_gate = [grad_logits]
        if gating.noise_rows:
            grad_gate.append(grad_logits * noise * scale.sigmoid() if gating.noisy else torch.zeros_like(grad_logits))
        to_ranks = (grad * factors.unsqueeze(-1)).flatten(-2)
        return torch.cat([*grad_gate, to_ranks], dim=-1).to(grad.dtype), None, None, None
