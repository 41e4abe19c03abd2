"""Measures the directions that earlier domains use, on their own validation rows, one pass for all projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from axolotl_brainstacks.adapter.layer import BrainstacksLayer
from axolotl_brainstacks.adapter.model import BrainstacksModel
from axolotl_brainstacks.distributed import sum_over_ranks
from axolotl_brainstacks.evaluation import Row, my_batches
from axolotl_brainstacks.nullspace import RankGram, fit_directions


@dataclass(frozen=True)
class Calibration:
    """Rows, and the stacks that are on while they run."""

    rows: list[Row]
    stacks: list[str]


@dataclass(frozen=True)
class NullSpace:
    """Outcome of a fit: per projection the columns to add, (out, d); and what they mean.

    energy: share of the earlier domains' delta energy that old and new columns hold together, over all projections.
    capacity_left: smallest share of a projection's output space that is still free.
    """

    columns: dict[str, Tensor]
    energy: float
    capacity_left: float
    tightest: str


def fit_null_space(
    model: PeftModel,
    tuner: BrainstacksModel,
    calibrations: Sequence[Calibration],
    held: dict[str, Tensor],
    directions: int,
    batch_size: int,
) -> NullSpace:
    """Add up to `directions` columns per projection to those `held`; every sample counts alike, whatever its length.

    Of B matrices one projection's at a time are in memory besides the banks.

    Raises:
        ValueError: if a projection has no direction left.
    """
    rows: dict[tuple[str, ...], list[Row]] = {}
    for calibration in calibrations:
        rows.setdefault(tuple(calibration.stacks), []).extend(calibration.rows)
    grams = {stacks: _grams(model, tuner, Calibration(mine, [*stacks]), batch_size) for stacks, mine in rows.items()}
    columns, captured, total, left = {}, 0.0, 0.0, {}
    with tuner.using_stacks([]):
        for layer in tuner.layers():
            parts = {stacks: found[layer] for stacks, found in grams.items() if layer in found}
            if not parts:
                continue
            basis = held.get(layer.module_name)
            outputs = torch.cat([_outputs(layer, stacks, gram.device) for stacks, gram in parts.items()])
            fit = fit_directions(torch.block_diag(*parts.values()), outputs, basis, directions)
            columns[layer.module_name] = fit.columns.cpu()
            captured, total = captured + fit.captured, total + fit.total
            used = fit.columns.shape[1] + (0 if basis is None else basis.shape[1])
            left[layer.module_name] = 1 - used / layer.out_features
    tightest = min(left, key=lambda name: left[name])
    if left[tightest] <= 0:
        raise ValueError(
            f"No direction is left for a new domain in {tightest}: earlier domains use its whole output space. Lower "
            "`brainstacks.null_space.directions` for a library trained from the start, or set it to 0 for this domain"
        )
    return NullSpace(columns, captured / total if total else 1.0, left[tightest], tightest)


@torch.no_grad()
def _grams(
    model: PeftModel, tuner: BrainstacksModel, calibration: Calibration, batch_size: int
) -> dict[BrainstacksLayer, Tensor]:
    """Per projection with stacks on: the second moment of their rank-space activations."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with tuner.using_stacks(calibration.stacks), model.disable_adapter():
        layers = [layer for layer in tuner.layers() if layer.bank.active]
        grams = {layer: RankGram() for layer in layers}
        for start, batch in my_batches(calibration.rows, batch_size, device):
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
            totals[layer] = sum_over_ranks(gram)
    model.train(was_training)
    return totals


def _outputs(layer: BrainstacksLayer, stacks: Sequence[str], device: torch.device) -> Tensor:
    """The B matrices (ranks, out) of `stacks`, which stay on in this projection."""
    layer.bank.select(stacks)
    return layer.bank.output_matrix().to(device, torch.float32)


def merge_columns(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The union of all domains' columns per projection, oldest first: (out, d)."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part], dim=1) for name in names}
