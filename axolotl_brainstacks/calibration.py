"""Measures the directions that a domain uses, on its own validation rows, one pass for all projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.nullspace import RankGram, fit_directions, rest_energy
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.distributed import sum_over_ranks
from axolotl_brainstacks.evaluation import Example, evaluating, my_batches


@dataclass(frozen=True)
class Calibration:
    """A domain's stacks, and rows to run them on; an imported domain has none."""

    rows: list[Example]
    stacks: list[str]


@dataclass(frozen=True)
class Moments:
    """What the stacks `stacks` add to their projections' outputs, up to a rotation of the tokens.

    grams: (R, R) by module name, on the CPU: the second moment of the rank-space activations, a mean over rows.
    """

    stacks: list[str]
    grams: dict[str, Tensor]


@dataclass(frozen=True)
class Energy:
    """Energy of a domain's deltas, summed over projections: the part within some columns, and all of it."""

    captured: float
    total: float

    @property
    def share(self) -> float:
        return self.captured / self.total if self.total else 1.0


def measure(model: PeftModel, tuner: StackTuner, calibration: Calibration, batch_size: int) -> Moments:
    """The domain's moments; every row counts alike, whatever its length. Every rank has to call it.

    Without rows every rank of every stack counts alike, so that the leading directions of the deltas are the leading left
    singular vectors of the B matrices.
    """
    with tuner.using_stacks(calibration.stacks):
        layers = [layer for layer in tuner.brainstacks_layers() if layer.bank.active]
        if calibration.rows:
            return Moments(calibration.stacks, _grams(model, tuner, layers, calibration.rows, batch_size))
        scales = {layer.module_name: layer.bank.output_scales() for layer in layers}
        return Moments(calibration.stacks, {name: torch.diag(scale.square()) for name, scale in scales.items()})


@torch.no_grad()
def _grams(
    model: PeftModel, tuner: StackTuner, layers: list[BrainstacksLinear], rows: list[Example], batch_size: int
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    grams = {layer: RankGram() for layer in layers}
    with evaluating(model), model.disable_adapter():
        for start, batch in my_batches(rows, batch_size, device):
            mask = batch.attention_mask.float()
            weights = mask / mask.sum(1, keepdim=True) if start is not None else torch.zeros_like(mask)
            for layer in layers:
                layer.bank.observer = lambda z, gram=grams[layer], weights=weights: gram.add(z, weights)
            try:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            finally:
                for layer in layers:
                    layer.bank.observer = None
    totals = {}
    for layer in layers:
        gram = grams[layer].total
        assert gram is not None
        totals[layer.module_name] = sum_over_ranks(gram).cpu() / len(rows)
    return totals


def fit_columns(tuner: StackTuner, moments: Moments, held: dict[str, Tensor], directions: int) -> dict[str, Tensor]:
    """The leading directions of the domain's deltas that `held` leaves: up to `directions` columns (out, d) per
    projection, orthonormal to those of `held`; on the CPU, fp32."""
    return {
        layer.module_name: fit_directions(gram, outputs, held.get(layer.module_name), directions).columns.cpu()
        for layer, gram, outputs in _by_layer(tuner, moments)
    }


def energy_within(tuner: StackTuner, moments: Moments, columns: dict[str, Tensor]) -> Energy:
    """How much of the domain's delta energy lies within orthonormal `columns`; in float64."""
    captured = total = 0.0
    for layer, gram, outputs in _by_layer(tuner, moments):
        gram, outputs = gram.double(), outputs.double()
        basis = columns.get(layer.module_name)
        basis = outputs.new_zeros(outputs.shape[1], 0) if basis is None else basis.to(outputs)
        everything = float(torch.einsum("rs,ro,so->", gram, outputs, outputs))
        captured, total = captured + everything - float(rest_energy(gram, outputs, basis)), total + everything
    return Energy(captured, total)


def capacity(tuner: StackTuner, columns: dict[str, Tensor]) -> dict[str, float]:
    """By module name, the share of a projection's output space outside `columns`.

    Raises:
        ValueError: if nothing is left of a projection's.
    """
    left = {
        layer.module_name: 1 - columns[layer.module_name].shape[1] / layer.out_features
        for layer in tuner.brainstacks_layers()
        if layer.module_name in columns
    }
    if full := [name for name, share in left.items() if share <= 0]:
        raise ValueError(
            f"No direction is left for a new domain in {full[0]}: other domains use its whole output space. Lower "
            "`brainstacks.null_space.directions` for a library trained from the start, or set it to 0 for this domain"
        )
    return left


def merge_columns(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The union of several domains' columns per projection, in the order given: (out, d)."""
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part], dim=1) for name in names}


def _by_layer(tuner: StackTuner, moments: Moments) -> Iterator[tuple[BrainstacksLinear, Tensor, Tensor]]:
    """Each projection with its Gram matrix (R, R) and the stacks' B matrices (R, out); one copy at a time is in memory."""
    device = next(tuner.parameters()).device
    with tuner.using_stacks(moments.stacks):
        for layer in tuner.brainstacks_layers():
            if layer.module_name in moments.grams:
                outputs = layer.bank.output_matrix().to(device, torch.float32)
                yield layer, moments.grams[layer.module_name].to(device), outputs
