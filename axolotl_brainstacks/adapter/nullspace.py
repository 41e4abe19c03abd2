"""The null space: output directions of other domains, which a new stack must not touch (arXiv 2604.01152, null space).

Per projection we keep ``V`` (out, d) with orthonormal columns. A new stack is trained with ``B' = B - V (V^T B)``, so its
output never has a component along ``V``, and the same B' is folded into the stack when it is frozen.

A frozen stack's output is ``z @ B`` with few ranks R in ``z``; the deltas' second moment ``B^T (sum w z z^T) B`` is
therefore known exactly from one R x R matrix per projection. So no sketch and no stored activations are needed: one pass
over the calibration rows, memory bounded by rank, and the directions are the exact leading ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def project_out(weight: Tensor, basis: Tensor) -> Tensor:
    """``W - V (V^T W)``: `weight` (out, r) without its components along `basis` (out, d), in the wider of their dtypes."""
    dtype = torch.promote_types(weight.dtype, basis.dtype)
    weight, basis = weight.to(dtype), basis.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        return weight - basis @ (basis.T @ weight)


def leakage(weight: Tensor, basis: Tensor) -> float:
    """``||V^T W|| / ||W||`` in float64: how much of `weight` (out, r) lies along `basis` (out, d); 0 for a zero weight."""
    weight, basis = weight.double(), basis.double()
    norm = weight.norm()
    return float((basis.T @ weight).norm() / norm) if norm > 0 else 0.0


class RankGram:
    """Weighted second moment ``sum_t w_t z_t z_t^T`` (R, R) of the gated rank-space activations, accumulated in fp32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, z: Tensor, token_weights: Tensor) -> None:
        """`z` (rows, tokens, R), `token_weights` (rows, tokens); a weight of 0 leaves a token out."""
        z = z.detach().flatten(0, -2).float() * token_weights.to(z.device).flatten().float().sqrt().unsqueeze(-1)
        with torch.autocast(z.device.type, enabled=False):
            gram = z.T @ z
        self.total = gram if self.total is None else self.total + gram


@dataclass(frozen=True)
class Fit:
    """New orthonormal columns (out, d) for one projection, and how much delta energy they and the old ones hold."""

    columns: Tensor
    captured: float
    total: float


def fit_directions(gram: Tensor, output: Tensor, basis: Tensor | None, directions: int) -> Fit:
    """Leading directions of the deltas ``z @ output`` that `basis` does not hold yet.

    Args:
        gram: (R, R) second moment of z.
        output: (R, out) the stacks' B matrices, ranks as rows.
        basis: (out, d) orthonormal columns kept so far, or None.
        directions: most columns to add; fewer come back when the deltas, or the space, have no more.
    """
    gram, output = gram.double(), output.double()
    held = output.new_zeros(output.shape[1], 0) if basis is None else basis.to(output)
    total = float(torch.einsum("rs,ro,so->", gram, output, output))
    rest = output.T - held @ (held.T @ output.T)
    q, r = torch.linalg.qr(rest)
    energies, vectors = torch.linalg.eigh(r @ gram @ r.T)
    order = energies.argsort(descending=True)[: min(directions, output.shape[1] - held.shape[1])]
    order = order[energies[order] > max(total, 1e-30) * 1e-10]
    union = torch.linalg.qr(torch.cat([held, q @ vectors[:, order]], dim=1))[0]
    captured = total - float(rest_energy(gram, output, union))
    return Fit(union[:, held.shape[1] :].float(), captured, total)


def rest_energy(gram: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """Energy of the deltas outside `basis`: ``tr(P B^T G B P)`` with P the complement's projector; a scalar."""
    rest = output.T - basis @ (basis.T @ output.T)
    return ((rest @ gram) * rest).sum()
