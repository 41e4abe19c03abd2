"""All frozen stacks of one projection, as few tensors as possible.

A segment holds consecutive stacks of equal shape: their gate and A rows concatenated, their B matrices concatenated, so
that two matmuls serve them all. The gates scale the activations in rank space, between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_brainstacks.adapter.gating import top_k_gates


@dataclass(frozen=True)
class StackShape:
    """What stacks of one segment share: ranks and experts, the experts a token uses, the output scale."""

    r: int
    num_experts: int
    top_k: int
    scaling: float


class BankSegment(nn.Module):
    """Consecutive frozen stacks of one shape. Weights are non-persistent buffers: never trained, never in checkpoints.

    Buffers:
        inputs: (stacks, experts + experts * r, in) gate rows, then the experts' A rows.
        outputs: (stacks, experts * r, out) the experts' B matrices, ranks as rows.
    """

    inputs: Tensor
    outputs: Tensor
    picked_inputs: Tensor | None
    picked_outputs: Tensor | None

    def __init__(self, shape: StackShape, name: str, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.names = [name]
        self.register_buffer("inputs", inputs.unsqueeze(0), persistent=False)
        self.register_buffer("outputs", outputs.unsqueeze(0), persistent=False)
        self.register_buffer("picked_inputs", None, persistent=False)
        self.register_buffer("picked_outputs", None, persistent=False)
        self.on = slice(0, 1)
        self.row_weights: Tensor | None = None

    def append(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        self.names.append(name)
        self.inputs = torch.cat([self.inputs, inputs.unsqueeze(0)])
        self.outputs = torch.cat([self.outputs, outputs.unsqueeze(0)])

    def remove(self, name: str) -> None:
        keep = [i for i, other in enumerate(self.names) if other != name]
        self.names = [self.names[i] for i in keep]
        self.inputs, self.outputs = self.inputs[keep], self.outputs[keep]

    def select(self, on: Sequence[str], weights: Tensor | None) -> None:
        """Switch on the stacks of `on`; `weights` (rows, len(on)) or None for 1 everywhere.

        A contiguous run is a view: with the same stacks on, the same bytes are multiplied in the same way whatever was
        appended later, and the result is the same to the last bit.
        """
        indices = [i for i, name in enumerate(self.names) if name in on]
        self.picked_inputs = self.picked_outputs = None
        self.on = slice(indices[0], indices[-1] + 1) if indices else slice(0, 0)
        if len(indices) != self.on.stop - self.on.start:
            self.picked_inputs, self.picked_outputs = self.inputs[indices], self.outputs[indices]
        self.row_weights = None
        if weights is not None and indices:
            self.row_weights = weights[:, [on.index(self.names[i]) for i in indices]]

    @property
    def active(self) -> bool:
        return self.on.stop > self.on.start

    def weights(self) -> tuple[Tensor, Tensor]:
        """The inputs and outputs of the stacks that are on."""
        if self.picked_inputs is not None and self.picked_outputs is not None:
            return self.picked_inputs, self.picked_outputs
        return self.inputs[self.on], self.outputs[self.on]

    def activations(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Gated, scaled rank-space activations (..., stacks * experts * r) of `x` (..., in)."""
        shape = self.shape
        h = F.linear(x, inputs.flatten(0, 1)).unflatten(-1, (inputs.shape[0], -1))
        gates = top_k_gates(h[..., : shape.num_experts].float(), shape.top_k) * shape.scaling
        if self.row_weights is not None:
            gates = gates * self._broadcast(self.row_weights, x)
        z = h[..., shape.num_experts :].unflatten(-1, (shape.num_experts, shape.r))
        return (z * gates.to(z.dtype).unsqueeze(-1)).flatten(-3)

    @staticmethod
    def _broadcast(weights: Tensor, x: Tensor) -> Tensor:
        """(rows, stacks) -> (rows, 1, stacks, 1); beam search repeats each row, so its weights are repeated too."""
        assert x.dim() == 3, "per-row stack weights need inputs of shape (rows, tokens, features)"
        if weights.shape[0] not in (1, x.shape[0]):
            weights = weights.repeat_interleave(x.shape[0] // weights.shape[0], dim=0)
        return weights[:, None, :, None]


class StackBank(nn.Module):
    """The frozen stacks of one projection, in the order they were attached."""

    def __init__(self) -> None:
        super().__init__()
        self.segments = nn.ModuleList()
        self.observer: Callable[[Tensor], None] | None = None

    @property
    def names(self) -> list[str]:
        return [name for segment in self._segments() for name in segment.names]

    @property
    def active(self) -> bool:
        return any(segment.active for segment in self._segments())

    def _segments(self) -> list[BankSegment]:
        return [segment for segment in self.segments if isinstance(segment, BankSegment)]

    def append(self, name: str, shape: StackShape, inputs: Tensor, outputs: Tensor) -> None:
        """Attach one stack: `inputs` (experts + experts * r, in), `outputs` (experts * r, out)."""
        last = self._segments()[-1] if self.segments else None
        if last is not None and last.shape == shape:
            last.append(name, inputs, outputs)
        else:
            self.segments.append(BankSegment(shape, name, inputs, outputs))

    def remove(self, name: str) -> None:
        for segment in self._segments():
            segment.remove(name)
        self.segments = nn.ModuleList(segment for segment in self._segments() if segment.names)

    def select(self, on: Sequence[str], weights: Tensor | None = None) -> None:
        for segment in self._segments():
            segment.select(on, weights)

    def output_matrix(self) -> Tensor:
        """The B matrices of all stacks that are on, ranks as rows: (R, out)."""
        return torch.cat([segment.weights()[1].flatten(0, 1) for segment in self._segments() if segment.active])

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the deltas of the stacks that are on: (..., in) -> (..., out)."""
        delta: Tensor | None = None
        activations = []
        for segment in self._segments():
            if not segment.active:
                continue
            inputs, outputs = segment.weights()
            z = segment.activations(x.to(inputs.dtype), inputs)
            if self.observer is not None:
                activations.append(z)
            part = z @ outputs.flatten(0, 1)
            delta = part if delta is None else delta + part
        if self.observer is not None:
            self.observer(torch.cat(activations, dim=-1))
        assert delta is not None, "a bank with no stack on must not be called"
        return delta
