"""The frozen stacks of one projection, in segments of equal shape, so that few matmuls compute all of them.

The result depends, to the last bit, only on which stacks are on: not on what else the bank holds, nor on the order in which
stacks were loaded. A stack thus gives the same output in training, when a whole library is in memory, and when only a part
of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from axolotl_brainstacks.adapter.gating import matmul
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.segment import BankSegment, StackShape, StackTensors


class StackBank(nn.Module):
    """The frozen stacks of one projection, in segments.

    One assignment replaces all segments, so an interrupted change leaves the old ones intact, except a segment that
    `BankSegment.changed` was changing in place.

    Attributes:
        segments: in the order of their numbers.
        observer: called with the rank-space activations (..., ranks of all stacks that are on) of each forward; used to fit the
            null space.
        offload: copies stacks to the device as forwards need them; None when they are kept on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments = nn.ModuleList()
        self.observer: Callable[[Tensor], None] | None = None
        self.offload: Offload | None = None

    @property
    def names(self) -> list[str]:
        """The stacks in the bank, by segment."""
        return [name for segment in self._segments() for name in segment.names]

    @property
    def active(self) -> bool:
        """Whether any stack is on."""
        return any(segment.active for segment in self._segments())

    def _segments(self) -> list[BankSegment]:
        return [segment for segment in self.segments if isinstance(segment, BankSegment)]

    def next_place(self, shape: StackShape) -> tuple[int, int]:
        """Segment number and place for a stack of this shape that is added after all others."""
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
        """Remove the stacks named in `gone` and add the stacks `new`.

        All stacks of a segment that changes are off afterwards.

        Args:
            gone: names; names that the bank does not hold are ignored.
            new: stacks to add.
            device: where to keep the weights of a segment that is created.
            dtype: what to keep them as.
        """
        segments = {segment.number: segment for segment in self._segments()}
        for number in sorted({*segments, *(stack.segment for stack in new)}):
            added = [stack for stack in new if stack.segment == number]
            if number not in segments:
                segments[number] = BankSegment.empty(added[0], device, dtype, self.offload is not None)
            if added or any(name in gone for name in segments[number].names):
                segments[number] = segments[number].changed(gone, added)
        self.segments = nn.ModuleList(segment for _, segment in sorted(segments.items()) if segment.names)
        self._forget_copies()

    def remove(self, name: str) -> None:
        """Remove a stack, if the bank holds it."""
        self.change({name})

    def select(self, on: Sequence[str], weights: Tensor | None = None) -> None:
        """Switch on exactly the stacks named in `on`.

        Args:
            on: names; those that the bank does not hold are ignored, because a stack need not cover every projection.
            weights: (rows, len(on)), factor of each stack for each row of the batch; None for 1 everywhere.
        """
        arranged = [segment.arranged(on) for segment in self._segments()]
        if any(new is not old for new, old in zip(arranged, self._segments(), strict=True)):
            self.segments = nn.ModuleList(arranged)
        for segment in self._segments():
            segment.select(on, weights)
        self._forget_copies()

    def _forget_copies(self) -> None:
        if self.offload is not None:
            self.offload.forget()

    def matrices(self) -> list[Tensor]:
        """The matrices that a forward multiplies by, in that order: inputs, then outputs of each active segment."""
        return [matrix for segment in self._segments() if segment.active for matrix in segment.weights()]

    def output_matrix(self) -> Tensor:
        """The B matrices of all stacks that are on, ranks as rows: (R, out) with R the sum of their ranks."""
        return torch.cat(self.matrices()[1::2])

    def output_scales(self) -> Tensor:
        """The output scale of each row of `output_matrix`: (R,), fp32."""
        active = [segment for segment in self._segments() if segment.active]
        return torch.cat([torch.full(s.weights()[1].shape[:1], s.shape.scaling) for s in active])

    def add_deltas(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the outputs of the stacks that are on.

        Args:
            x: (..., in), the projection's input.
            y: (..., out), the base layer's output.

        Returns:
            (..., out), in the dtype of `y`.
        """
        # Segments are modules, but only their methods are called, not `forward`. ZeRO-3 gathers parameters in module hooks and
        # hangs when ranks call different modules, and on one rank all stacks may be off.
        activations = []
        for segment in self._segments():
            if not segment.active:
                continue
            inputs, outputs = segment.weights()
            x = x.to(inputs.dtype)
            z = segment.activations(x, self._matmul(x, inputs))
            if self.observer is not None:
                activations.append(z)
            y = self._matmul(z, outputs, y)
        if self.observer is not None:
            self.observer(torch.cat(activations, dim=-1))
        return y

    def _matmul(self, x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
        return matmul(x, matrix, y) if self.offload is None else self.offload.matmul(self, x, matrix, y)
