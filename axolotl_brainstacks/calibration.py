"""Measures which output directions a domain uses: one pass over its validation examples serves all projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

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
    """What a domain's directions are measured with.

    Attributes:
        rows: validation examples of the domain; none for a domain imported from a LoRA.
        stacks: names of the domain's stacks.
    """

    rows: list[Example]
    stacks: list[str]


@dataclass(frozen=True)
class Moments:
    """Second moments of a domain's rank-space activations, which determine those of its deltas.

    Attributes:
        stacks: names of the stacks that were on.
        grams: by module name, (R, R) on the CPU: the second moment of the activations z, a mean over examples.
    """

    stacks: list[str]
    grams: dict[str, Tensor]


@dataclass(frozen=True)
class Energy:
    """Energy (squared norm) of a domain's deltas, summed over projections.

    Attributes:
        captured: the part within the span of given columns.
        total: all of it.
    """

    captured: float
    total: float

    @property
    def share(self) -> float:
        """The captured part, from 0 to 1; 1 when there is no energy to capture."""
        return self.captured / self.total if self.total else 1.0


def measure(model: PeftModel, tuner: StackTuner, calibration: Calibration, batch_size: int) -> Moments:
    """The moments of a domain. Every example has the same weight, whatever its length. Every process must call this.

    Args:
        model: the model, in any mode.
        tuner: its tuner.
        calibration: examples and stacks.
        batch_size: examples per forward.
    """
    with tuner.using_stacks(calibration.stacks):
        layers = [layer for layer in tuner.brainstacks_layers() if layer.bank.active]
        if calibration.rows:
            return Moments(calibration.stacks, _grams(model, tuner, layers, calibration.rows, batch_size))
        # Without examples, take z to be white noise of the stacks' output scale. The principal directions of the deltas are then
        # the leading left singular vectors of the (scaled) B matrices.
        scales = {layer.module_name: layer.bank.output_scales() for layer in layers}
        return Moments(calibration.stacks, {name: torch.diag(scale.square()) for name, scale in scales.items()})


@torch.no_grad()
def _grams(
    model: PeftModel, tuner: StackTuner, layers: list[BrainstacksLinear], rows: list[Example], batch_size: int
) -> dict[str, Tensor]:
    """By module name, the second moment (R, R) of the activations, averaged over `rows`, on the CPU. Equal on every process."""
    device = next(model.parameters()).device
    grams = {layer: RankGram() for layer in layers}
    with evaluating(model), model.disable_adapter():
        for start, batch in my_batches(rows, batch_size, device):
            mask = batch.attention_mask.float()  # (rows, tokens)
            # The tokens of an example share a weight of 1. A surplus batch (start None) is run for the collectives only.
            weights = mask / mask.sum(1, keepdim=True) if start is not None else torch.zeros_like(mask)
            for layer in layers:
                layer.bank.observer = partial(grams[layer].add, token_weights=weights)
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
    """The principal directions of a domain's deltas outside the span of `held`.

    Args:
        tuner: of the model with the domain's stacks.
        moments: of the domain.
        held: by module name, the orthonormal columns (out, d) found so far; a projection may have none.
        directions: most columns to add per projection.

    Returns:
        By module name, new columns (out, at most `directions`), orthonormal to each other and to those of `held`; fp32, on the
        CPU.
    """
    return {
        layer.module_name: fit_directions(gram, outputs, held.get(layer.module_name), directions).columns.cpu()
        for layer, gram, outputs in _by_layer(tuner, moments)
    }


def energy_within(tuner: StackTuner, moments: Moments, columns: dict[str, Tensor]) -> Energy:
    """How much of a domain's delta energy lies within the span of `columns`, computed in float64.

    Args:
        tuner: of the model with the domain's stacks.
        moments: of the domain.
        columns: by module name, orthonormal columns (out, d); a projection may have none.
    """
    captured = total = 0.0
    for layer, gram, outputs in _by_layer(tuner, moments):
        gram, outputs = gram.double(), outputs.double()
        basis = columns.get(layer.module_name)
        basis = outputs.new_zeros(outputs.shape[1], 0) if basis is None else basis.to(outputs)
        energy = float(torch.einsum("rs,ro,so->", gram, outputs, outputs))  # tr(B^T G B)
        captured = captured + energy - float(rest_energy(gram, outputs, basis))
        total = total + energy
    return Energy(captured, total)


def capacity(tuner: StackTuner, columns: dict[str, Tensor]) -> dict[str, float]:
    """By module name, the share of a projection's output dimensions that `columns` leave free.

    Args:
        tuner: of the model.
        columns: by module name, orthonormal columns (out, d).

    Raises:
        ValueError: if a projection has no free dimension.
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
    """By module name, the columns of several domains side by side, (out, sum of the d), in the order given."""
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part], dim=1) for name in names}


def _by_layer(tuner: StackTuner, moments: Moments) -> Iterator[tuple[BrainstacksLinear, Tensor, Tensor]]:
    """Each projection with its Gram matrix (R, R) and the stacks' B matrices (R, out) in fp32, on the computing device.

    A generator, so that the copies of one projection only are in memory.
    """
    device = next(tuner.parameters()).device
    with tuner.using_stacks(moments.stacks):
        for layer in tuner.brainstacks_layers():
            if layer.module_name in moments.grams:
                outputs = layer.bank.output_matrix().to(device, torch.float32)
                yield layer, moments.grams[layer.module_name].to(device), outputs
