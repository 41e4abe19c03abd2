"""The null space: output directions of other domains, which a new stack must not touch (arXiv 2604.01152, null space).

For each projection, ``V`` (out, d) has orthonormal columns that span the directions which earlier domains use. A new stack is
trained with ``B' = B - V (V^T B)``, so its output never has a component along ``V``. When it is frozen, B' is stored.

The directions of a domain are the principal components of its stacks' outputs. Such an output is a delta ``z @ B`` with z (R,)
and B (R, out), where the number of ranks R is small. So the second moment of the deltas, ``B^T G B``, follows exactly from
``G = sum_t w_t z_t z_t^T`` (R, R). One pass over the calibration examples accumulates G; neither the activations nor any
(out, out) matrix is stored, and the principal components are exact, not the estimates of a randomised sketch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def project_out(weight: Tensor, basis: Tensor) -> Tensor:
    """``W - V (V^T W)``: remove from `weight` its components along `basis`.

    Args:
        weight: W (out, r).
        basis: V (out, d), orthonormal columns.

    Returns:
        (out, r) in the wider of the two dtypes.
    """
    dtype = torch.promote_types(weight.dtype, basis.dtype)
    weight, basis = weight.to(dtype), basis.to(dtype)
    # Autocast would multiply in bf16 and leave components along V that are far larger than fp32 rounding.
    with torch.autocast(weight.device.type, enabled=False):
        return weight - basis @ (basis.T @ weight)


def leakage(weight: Tensor, basis: Tensor) -> float:
    """``||V^T W|| / ||W||``, computed in float64: the part of `weight` that lies along `basis`.

    Args:
        weight: W (out, r).
        basis: V (out, d), orthonormal columns.

    Returns:
        A number from 0 to 1; 0 for a zero weight.
    """
    weight, basis = weight.double(), basis.double()
    norm = weight.norm()
    return float((basis.T @ weight).norm() / norm) if norm > 0 else 0.0


class RankGram:
    """Accumulates the second moment ``G = sum_t w_t z_t z_t^T`` of the gated rank-space activations.

    Attributes:
        total: (R, R), fp32; None until the first `add`.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, z: Tensor, token_weights: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            z: (rows, tokens, R).
            token_weights: w (rows, tokens), not negative; a weight of 0 leaves a token out.
        """
        root = token_weights.to(z.device).flatten().float().sqrt().unsqueeze(-1)  # (rows * tokens, 1)
        z = z.detach().flatten(0, -2).float() * root  # (rows * tokens, R)
        with torch.autocast(z.device.type, enabled=False):
            gram = z.T @ z
        self.total = gram if self.total is None else self.total + gram


@dataclass(frozen=True)
class Fit:
    """The result of `fit_directions` for one projection.

    Attributes:
        columns: (out, d), fp32, the new orthonormal columns.
        captured: energy of the deltas within the span of the old and the new columns.
        total: energy of the deltas, ``sum_t w_t ||z_t B||^2``.
    """

    columns: Tensor
    captured: float
    total: float


def fit_directions(gram: Tensor, output: Tensor, basis: Tensor | None, directions: int) -> Fit:
    """The principal directions of the deltas ``z @ output`` outside the span of `basis`.

    Args:
        gram: G (R, R), second moment of z.
        output: B (R, out), the stacks' B matrices, ranks as rows.
        basis: (out, d), orthonormal columns found so far, or None.
        directions: most columns to add. Fewer are added when the deltas, or the output space, have no more directions.
    """
    gram, output = gram.double(), output.double()
    held = output.new_zeros(output.shape[1], 0) if basis is None else basis.to(output)  # (out, d)
    total = float(torch.einsum("rs,ro,so->", gram, output, output))  # tr(B^T G B)
    rest = output.T - held @ (held.T @ output.T)  # (out, R), B^T outside the span of `held`
    # With rest = Q T the covariance is Q (T G T^T) Q^T, and Q has orthonormal columns. So its eigenvectors are Q times those
    # of the small matrix T G T^T.
    q, t = torch.linalg.qr(rest)  # (out, k), (k, R) with k = min(out, R)
    energies, vectors = torch.linalg.eigh(t @ gram @ t.T)  # (k,), (k, k)
    order = energies.argsort(descending=True)[: min(directions, output.shape[1] - held.shape[1])]
    order = order[energies[order] > max(total, 1e-30) * 1e-10]  # the others are zero but for rounding
    # The new columns are orthogonal to `held` only up to rounding; one QR of them all makes the union orthonormal.
    union = torch.linalg.qr(torch.cat([held, q @ vectors[:, order]], dim=1))[0]
    captured = total - float(rest_energy(gram, output, union))
    return Fit(union[:, held.shape[1] :].float(), captured, total)


def rest_energy(gram: Tensor, output: Tensor, basis: Tensor) -> Tensor:
    """Energy of the deltas outside the span of `basis`: ``tr(P B^T G B P)`` with ``P = I - V V^T``.

    Args:
        gram: G (R, R).
        output: B (R, out).
        basis: V (out, d), orthonormal columns.

    Returns:
        A scalar tensor.
    """
    rest = output.T - basis @ (basis.T @ output.T)  # (out, R)
    return ((rest @ gram) * rest).sum()
