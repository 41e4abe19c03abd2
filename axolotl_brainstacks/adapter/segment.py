"""Frozen stacks of one projection that have one shape, concatenated so that two matmuls compute all of them.

The first matmul applies the gate and A rows of all stacks, the gates then scale the activations in rank space, and the
second matmul applies the B matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axolotl_brainstacks.adapter.gating import Gating, gated


@dataclass(frozen=True)
class StackShape:
    """What the stacks of one segment have in common.

    Attributes:
        r: rank of each expert.
        num_experts: number of experts.
        top_k: experts that a token uses.
        scaling: factor on the experts' output.
    """

    r: int
    num_experts: int
    top_k: int
    scaling: float


@dataclass(frozen=True)
class StackTensors:
    """One stack's weights for one projection, as its file holds them.

    Attributes:
        name: of the stack.
        shape: ranks, experts and scale.
        a: (2 * experts + experts * r, in), rows: gate W_r, noise W_n, the experts' A.
        b: (out, experts * r), the experts' B matrices side by side.
        segment: number of the segment that the stack belongs to; a new segment starts where the shape changes.
        place: position of the stack among all stacks, in the order in which they were trained.
    """

    name: str
    shape: StackShape
    a: Tensor
    b: Tensor
    segment: int
    place: int


class BankSegment(nn.Module):
    """Consecutive frozen stacks of one shape.

    The weights are non-persistent buffers: no optimiser trains them and no checkpoint holds them. Offloaded weights are plain
    attributes instead, so that `model.to(...)` leaves them in (pinned) CPU memory and DDP does not broadcast them.

    Attributes:
        number: of this segment, in the order in which stacks were trained.
        names, places: of the stacks, in the order of the tensors' first dimension.
        inputs: (stacks, experts + experts * r, in), gate rows, then the experts' A rows. The noise rows are for training only.
        outputs: (stacks, experts * r, out), the experts' B matrices, ranks as rows.
        on: the slice of stacks that are on.
        row_weights: (rows, stacks that are on), fp32 factor of each stack for each row of the batch; None for 1 everywhere.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(
        self,
        number: int,
        shape: StackShape,
        inputs: Tensor,
        outputs: Tensor,
        names: Sequence[str],
        places: Sequence[int],
        offloaded: bool,
    ) -> None:
        super().__init__()
        self.number = number
        self.shape = shape
        self.names = list(names)
        self.places = list(places)
        self.offloaded = offloaded
        if offloaded and torch.cuda.is_available():
            inputs, outputs = inputs.pin_memory(), outputs.pin_memory()
        if not offloaded:
            # A buffer is registered once; the assignments below then set its value.
            self.register_buffer("inputs", None, persistent=False)
            self.register_buffer("outputs", None, persistent=False)
        self.inputs, self.outputs = inputs, outputs
        self.on = slice(0, 0)
        self.row_weights: Tensor | None = None

    @classmethod
    def empty(
        cls, first: StackTensors, device: torch.device | None, dtype: torch.dtype | None, offloaded: bool
    ) -> BankSegment:
        """A segment that can hold stacks shaped like `first` and holds none yet."""
        rows = first.a.shape[0] - first.shape.num_experts  # without the noise rows
        ranks = first.b.shape[1]
        inputs = torch.empty(0, rows, first.a.shape[1], device=device, dtype=dtype)
        outputs = torch.empty(0, ranks, first.b.shape[0], device=device, dtype=dtype)
        return cls(first.segment, first.shape, inputs, outputs, (), (), offloaded)

    def changed(self, gone: Collection[str], new: Sequence[StackTensors]) -> BankSegment:
        """A segment without the stacks `gone` and with the stacks `new`; none of its stacks is on.

        If as many stacks leave as come, this segment is changed in place, so that the new stacks reuse the memory of the old
        ones. Otherwise a new segment is returned and this one stays as it is.
        """
        # An offloaded tensor is not overwritten, because an asynchronous copy of it to the device may be in progress.
        free = [i for i, name in enumerate(self.names) if name in gone]
        segment = self
        if self.offloaded or len(free) != len(new):
            kept = [i for i in range(len(self.names)) if i not in free]
            free = list(range(len(kept), len(kept) + len(new)))
            segment = self._like(
                _resized(self.inputs, kept, len(new)),
                _resized(self.outputs, kept, len(new)),
                [self.names[i] for i in kept] + [""] * len(new),
                [self.places[i] for i in kept] + [0] * len(new),
            )
        segment.on = slice(0, 0)
        segment.row_weights = None
        n = self.shape.num_experts
        for i, stack in zip(free, new, strict=True):
            segment.inputs[i, :n].copy_(stack.a[:n])
            segment.inputs[i, n:].copy_(stack.a[2 * n :])  # rows n to 2n make the noise of training
            segment.outputs[i].copy_(stack.b.T)
            segment.names[i], segment.places[i] = stack.name, stack.place
        return segment

    def _like(self, inputs: Tensor, outputs: Tensor, names: Sequence[str], places: Sequence[int]) -> BankSegment:
        """A segment with the same number, shape and kind of memory."""
        return BankSegment(self.number, self.shape, inputs, outputs, names, places, self.offloaded)

    def _indices(self, on: Sequence[str]) -> list[int]:
        """Indices of the stacks named in `on`, sorted by the stacks' places."""
        return sorted((i for i, name in enumerate(self.names) if name in on), key=lambda i: self.places[i])

    @torch.inference_mode(False)  # for the reason given at BrainstacksLinear.update_bank
    def arranged(self, on: Sequence[str]) -> BankSegment:
        """This segment if the stacks named in `on` are adjacent and sorted by place; else a reordered copy in which they are.

        A slice of the tensors then holds the stacks that are on. The matmuls get the same bytes in the same order whatever
        else the segment holds, so their rounding does not change either.
        """
        wanted = self._indices(on)
        if _consecutive(wanted):
            return self
        order = wanted + [i for i in range(len(self.names)) if i not in wanted]
        names = [self.names[i] for i in order]
        places = [self.places[i] for i in order]
        return self._like(self.inputs[order], self.outputs[order], names, places)

    def select(self, on: Sequence[str], weights: Tensor | None) -> None:
        """Switch on the stacks of this segment that `on` names, and no others. The segment must be `arranged` for `on`.

        Args:
            on: names of stacks, of this segment or others.
            weights: (rows, len(on)), factor of each stack for each row of the batch; None for 1 everywhere.
        """
        wanted = self._indices(on)
        assert _consecutive(wanted), "segment is not arranged"
        self.on = slice(wanted[0], wanted[-1] + 1) if wanted else slice(0, 0)
        self.row_weights = None
        if weights is not None and wanted:
            columns = [on.index(self.names[i]) for i in wanted]
            self.row_weights = weights[:, columns].to(self.inputs.device, torch.float32)

    @property
    def active(self) -> bool:
        """Whether any stack is on."""
        return self.on.stop > self.on.start

    def weights(self) -> tuple[Tensor, Tensor]:
        """The matrices of the stacks that are on: inputs (gate and A rows, in) and outputs (ranks, out). Both are views."""
        return self.inputs[self.on].flatten(0, 1), self.outputs[self.on].flatten(0, 1)

    def activations(self, x: Tensor, h: Tensor) -> Tensor:
        """The gated, scaled rank-space activations of the stacks that are on.

        Args:
            x: (..., in), the projection's input.
            h: (..., stacks * (experts + experts * r)), ``linear(x, inputs)``.

        Returns:
            (..., stacks * experts * r).
        """
        h = h.unflatten(-1, (self.on.stop - self.on.start, -1))  # (..., stacks, experts + experts * r)
        gating = Gating(self.shape.num_experts, self.shape.r, self.shape.top_k, self.shape.scaling)
        weights = self.row_weights
        if weights is not None:
            if self.offloaded and weights.device != x.device:
                # `select` put them where the tensors are, on the CPU; every later forward finds them on the device.
                self.row_weights = weights = weights.to(x.device)
            weights = self._broadcast(weights, x)
        return gated(h, gating, weights)[0]

    @staticmethod
    def _broadcast(weights: Tensor, x: Tensor) -> Tensor:
        """(rows, stacks) -> (rows, 1, stacks, 1), or (stacks, 1) when one row of weights serves the whole batch.

        Raises:
            ValueError: if `x` has no dimension for the rows.
        """
        if weights.shape[0] == 1:
            return weights[0, :, None]
        if x.dim() != 3:
            raise ValueError(
                "A projection sees the tokens of all rows in one line, as in some mixture-of-experts models, so rows cannot "
                "have stacks of their own: answer one prompt at a time (for the router `eval_batch_size: 1`), or train with "
                "it in `lora_exclude_modules`"
            )
        if weights.shape[0] != x.shape[0]:
            # Beam search and `num_return_sequences` repeat each row of the batch.
            weights = weights.repeat_interleave(x.shape[0] // weights.shape[0], dim=0)
        return weights[:, None, :, None]


def _consecutive(indices: Sequence[int]) -> bool:
    """Whether the indices are i, i + 1, i + 2, ..."""
    return all(index == indices[0] + step for step, index in enumerate(indices))


def _resized(held: Tensor, kept: Sequence[int], room: int) -> Tensor:
    """A tensor with the entries `kept` of `held`'s first dimension, then `room` uninitialised entries."""
    resized = held.new_empty(len(kept) + room, *held.shape[1:])
    for slot, i in enumerate(kept):
        resized[slot].copy_(held[i])
    return resized
