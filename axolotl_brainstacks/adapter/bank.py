"""All frozen stacks of one projection, as few tensors as possible.

A segment holds consecutive stacks of equal shape: their gate and A rows concatenated, their B matrices concatenated, so
that two matmuls serve them all. The gates scale the activations in rank space, between the two.

What a selection computes depends, to the last bit, on the stacks that are on alone: not on what else the bank holds, nor
on the order in which stacks came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axolotl_brainstacks.adapter.gating import Gating, gated, matmul
from axolotl_brainstacks.adapter.offload import Offload


@dataclass(frozen=True)
class StackShape:
    """What stacks of one segment share: ranks and experts, the experts a token uses, the output scale."""

    r: int
    num_experts: int
    top_k: int
    scaling: float


@dataclass(frozen=True)
class StackTensors:
    """One stack of one projection, as its file holds it.

    a: (2 * experts + experts * r, in), rows W_r, W_n, A. b: (out, experts * r).
    segment, place: which run of equal shapes it belongs to, and its number among all stacks, both counted in the order
    in which the stacks were trained.
    """

    name: str
    shape: StackShape
    a: Tensor
    b: Tensor
    segment: int
    place: int


class BankSegment(nn.Module):
    """Consecutive frozen stacks of one shape. Weights are non-persistent buffers: never trained, never in checkpoints.

    Offloaded ones are plain attributes instead: they stay in pinned CPU memory wherever the model goes, and DDP does not
    broadcast them.

    number: of the segment, counted in the order in which stacks were trained. names, places: of the stacks, in the order
    of the tensors.

    Buffers:
        inputs: (stacks, experts + experts * r, in) gate rows, then the experts' A rows.
        outputs: (stacks, experts * r, out) the experts' B matrices, ranks as rows.
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
            self.register_buffer("inputs", None, persistent=False)
            self.register_buffer("outputs", None, persistent=False)
        self.inputs, self.outputs = inputs, outputs
        self.on = slice(0, 0)
        self.row_weights: Tensor | None = None

    @classmethod
    def empty(
        cls, first: StackTensors, device: torch.device | None, dtype: torch.dtype | None, offloaded: bool
    ) -> BankSegment:
        """A segment for stacks like `first`, without any."""
        rows, ranks = first.a.shape[0] - first.shape.num_experts, first.b.shape[1]
        inputs = torch.empty(0, rows, first.a.shape[1], device=device, dtype=dtype)
        outputs = torch.empty(0, ranks, first.b.shape[0], device=device, dtype=dtype)
        return cls(first.segment, first.shape, inputs, outputs, (), (), offloaded)

    def changed(self, gone: Collection[str], new: Sequence[StackTensors]) -> BankSegment:
        """A segment without the stacks `gone` and with `new` ones, none of them on. This one stays as it is, except where
        as many leave as come: then it is the one that is changed, and the memory of the old serves the new.

        New tensors are copied once, straight from where they are. Offloaded tensors are never written to twice: a copy of
        the old ones to the device may be under way.
        """
        free = [i for i, name in enumerate(self.names) if name in gone]
        segment = self
        if self.offloaded or len(free) != len(new):
            kept = [i for i in range(len(self.names)) if i not in free]
            free = list(range(len(kept), len(kept) + len(new)))
            segment = self._with(
                _resized(self.inputs, kept, len(new)),
                _resized(self.outputs, kept, len(new)),
                [self.names[i] for i in kept] + [""] * len(new),
                [self.places[i] for i in kept] + [0] * len(new),
            )
        segment.on, segment.row_weights = slice(0, 0), None
        n = self.shape.num_experts
        for i, stack in zip(free, new, strict=True):
            segment.inputs[i, :n].copy_(stack.a[:n])
            segment.inputs[i, n:].copy_(stack.a[2 * n :])
            segment.outputs[i].copy_(stack.b.T)
            segment.names[i], segment.places[i] = stack.name, stack.place
        return segment

    def _with(self, inputs: Tensor, outputs: Tensor, names: Sequence[str], places: Sequence[int]) -> BankSegment:
        return BankSegment(self.number, self.shape, inputs, outputs, names, places, self.offloaded)

    def _wanted(self, on: Sequence[str]) -> list[int]:
        """Where the stacks of `on` are, in the order of their places."""
        return sorted((i for i, name in enumerate(self.names) if name in on), key=lambda i: self.places[i])

    @torch.inference_mode(False)  # as in BrainstacksLinear.hold
    def arranged(self, on: Sequence[str]) -> BankSegment:
        """This segment if the stacks of `on` are neighbours in it, in the order of their places; else one in which they are.

        A view serves neighbours, and the same bytes are multiplied in the same way whatever else is held.
        """
        wanted = self._wanted(on)
        if not wanted or wanted == list(range(wanted[0], wanted[0] + len(wanted))):
            return self
        order = wanted + [i for i in range(len(self.names)) if i not in wanted]
        names, places = [self.names[i] for i in order], [self.places[i] for i in order]
        return self._with(self.inputs[order], self.outputs[order], names, places)

    def select(self, on: Sequence[str], weights: Tensor | None) -> None:
        """Switch on the stacks of `on`, which are neighbours; `weights` (rows, len(on)) or None for 1 everywhere."""
        wanted = self._wanted(on)
        assert not wanted or wanted == list(range(wanted[0], wanted[0] + len(wanted))), "segment is not arranged"
        self.on = slice(wanted[0], wanted[-1] + 1) if wanted else slice(0, 0)
        self.row_weights = None
        if weights is not None and wanted:
            columns = [on.index(self.names[i]) for i in wanted]
            self.row_weights = weights[:, columns].to(self.inputs.device, torch.float32)

    @property
    def active(self) -> bool:
        return self.on.stop > self.on.start

    def weights(self) -> tuple[Tensor, Tensor]:
        """The inputs (rows, in) and outputs (ranks, out) of the stacks that are on."""
        return self.inputs[self.on].flatten(0, 1), self.outputs[self.on].flatten(0, 1)

    def activations(self, x: Tensor, h: Tensor) -> Tensor:
        """Gated, scaled rank-space activations (..., stacks * experts * r) of `x` (..., in); `h` is ``x @ inputs``."""
        h = h.unflatten(-1, (self.on.stop - self.on.start, -1))
        gating = Gating(self.shape.num_experts, self.shape.r, self.shape.top_k, self.shape.scaling)
        weights = self.row_weights
        if weights is not None:
            if self.offloaded and weights.device != x.device:
                self.row_weights = weights = weights.to(x.device)
            weights = self._broadcast(weights, x)
        return gated(h, gating, weights)[0]

    @staticmethod
    def _broadcast(weights: Tensor, x: Tensor) -> Tensor:
        """(rows, stacks) -> (rows, 1, stacks, 1); beam search repeats each row, so its weights are repeated too."""
        if weights.shape[0] == 1:
            return weights[0, :, None]
        if x.dim() != 3:
            raise ValueError(
                "A projection sees the tokens of all rows in one line, as in some mixture-of-experts models, so rows cannot "
                "have stacks of their own: answer one prompt at a time (for the router `eval_batch_size: 1`), or train with "
                "it in `lora_exclude_modules`"
            )
        if weights.shape[0] != x.shape[0]:
            weights = weights.repeat_interleave(x.shape[0] // weights.shape[0], dim=0)
        return weights[:, None, :, None]


def _resized(held: Tensor, kept: Sequence[int], room: int) -> Tensor:
    """The stacks `kept` of `held`, and room for more behind them."""
    resized = held.new_empty(len(kept) + room, *held.shape[1:])
    for slot, i in enumerate(kept):
        resized[slot].copy_(held[i])
    return resized


class StackBank(nn.Module):
    """The frozen stacks of one projection.

    Its segments, in the order of their numbers, are replaced all at once: an interrupted change leaves the old ones whole,
    except where stacks were exchanged in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments = nn.ModuleList()
        self.observer: Callable[[Tensor], None] | None = None
        self.offload: Offload | None = None

    @property
    def names(self) -> list[str]:
        return [name for segment in self._segments() for name in segment.names]

    @property
    def active(self) -> bool:
        return any(segment.active for segment in self._segments())

    def _segments(self) -> list[BankSegment]:
        return [segment for segment in self.segments if isinstance(segment, BankSegment)]

    def next_place(self, shape: StackShape) -> tuple[int, int]:
        """Segment and place of a stack that comes after all that are held."""
        if not self.segments:
            return 0, 0
        last = self._segments()[-1]
        return last.number + (last.shape != shape), max(last.places) + 1

    def change(
        self,
        gone: Collection[str],
        new: Sequence[StackTensors] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take stacks out and in, kept as `dtype` on `device`; a segment that changes has no stack on afterwards."""
        segments = {segment.number: segment for segment in self._segments()}
        for number in sorted({*segments, *(stack.segment for stack in new)}):
            mine = [stack for stack in new if stack.segment == number]
            if number not in segments:
                segments[number] = BankSegment.empty(mine[0], device, dtype, self.offload is not None)
            if mine or any(name in gone for name in segments[number].names):
                segments[number] = segments[number].changed(gone, mine)
        self.segments = nn.ModuleList(segment for _, segment in sorted(segments.items()) if segment.names)
        self._changed()

    def remove(self, name: str) -> None:
        self.change({name})

    def select(self, on: Sequence[str], weights: Tensor | None = None) -> None:
        """Switch on exactly the stacks of `on`; `weights` (rows, len(on)) or None for 1 everywhere."""
        arranged = [segment.arranged(on) for segment in self._segments()]
        if any(new is not old for new, old in zip(arranged, self._segments(), strict=True)):
            self.segments = nn.ModuleList(arranged)
        for segment in self._segments():
            segment.select(on, weights)
        self._changed()

    def _changed(self) -> None:
        if self.offload is not None:
            self.offload.forget()

    def matrices(self) -> list[Tensor]:
        """What a forward multiplies by, in its order: inputs and outputs of each segment that is on."""
        return [matrix for segment in self._segments() if segment.active for matrix in segment.weights()]

    def output_matrix(self) -> Tensor:
        """The B matrices of all stacks that are on, ranks as rows: (R, out)."""
        return torch.cat(self.matrices()[1::2])

    def output_scales(self) -> Tensor:
        """The output scale of each rank of `output_matrix`: (R,), fp32."""
        active = [segment for segment in self._segments() if segment.active]
        return torch.cat([torch.full(s.weights()[1].shape[:1], s.shape.scaling) for s in active])

    def add_deltas(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` (..., out) plus the deltas for `x` (..., in) of the stacks that are on.

        No module is called here: ZeRO-3 hangs where ranks call different ones, and one may have no stack on.
        """
        activations = []
        for segment in self._segments():
            if not segment.active:
                continue
            inputs, outputs = segment.weights()
            x = x.to(inputs.dtype)
            z = segment.activations(x, self._times(x, inputs))
            if self.observer is not None:
                activations.append(z)
            y = self._times(z, outputs, y)
        if self.observer is not None:
            self.observer(torch.cat(activations, dim=-1))
        return y

    def _times(self, x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
        return matmul(x, matrix, y) if self.offload is None else self.offload.matmul(self, x, matrix, y)
