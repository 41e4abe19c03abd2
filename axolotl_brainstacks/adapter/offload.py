"""Offloading: frozen stacks stay in CPU memory and are copied to the GPU one decoder layer before they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from axolotl_brainstacks.adapter.gating import matmul

# "model.layers.3.mlp.up_proj" -> "model.layers.3"
DECODER_LAYER = re.compile(r".*?\.\d+(?=\.)")


class Offloaded(Protocol):
    """The frozen stacks of one projection, in CPU memory; `StackBank` without its type, which would make a circular import."""

    training: bool

    def matrices(self) -> Iterable[Tensor]:
        """The matrices that a forward multiplies by, in that order."""
        ...


@dataclass(frozen=True)
class _Copy:
    """A copy on the device, perhaps still in progress.

    Attributes:
        held: the tensor in CPU memory. Keeping it alive keeps its address from being reused, and the address is the key of
            the copy.
        copy: `held` on the device, once the event `done` has occurred.
        done: None on a CPU.
    """

    held: Tensor
    copy: Tensor
    done: torch.cuda.Event | None

    def ready(self) -> Tensor:
        """The copy, for use on the current stream."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.copy.device)
            stream.wait_event(self.done)
            # The copy belongs to another stream. Without this the allocator could reuse its memory before `stream` is done.
            self.copy.record_stream(stream)
        return self.copy


class Offload:
    """Keeps device copies of the frozen stacks of two decoder layers: the current one and the next one.

    On a CPU, a copy is the tensor itself.
    """

    def __init__(self) -> None:
        # The banks of each decoder layer, in the order in which the model computes, and each bank's number in it.
        self._groups: dict[str, list[Offloaded]] = {}
        self._group_of: dict[Offloaded, int] = {}
        # The number of the layer that computes; None before the first.
        self._here: int | None = None
        self._copies: dict[tuple[int, torch.Size, torch.device], _Copy] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Per device, an event that the GPU passes when it begins the current layer.
        self._reached: dict[torch.device, torch.cuda.Event] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state without device copies, streams and events, which `copy.deepcopy` of the model cannot copy."""
        return vars(self) | {"_here": None, "_copies": {}, "_streams": {}, "_reached": {}}

    def join(self, bank: Offloaded, module_name: str) -> None:
        """Register the bank of the projection `module_name`. Banks must join in the order in which the model computes."""
        layer = DECODER_LAYER.match(module_name)
        group = self._groups.setdefault(layer[0] if layer else module_name, [])
        group.append(bank)
        self._group_of[bank] = list(self._groups.values()).index(group)

    def forget(self) -> None:
        """Drop all device copies, because the bank's stacks or the selection of stacks have changed."""
        self._here = None
        self._copies = {}

    @torch.compiler.disable
    def matmul(self, bank: Offloaded, x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
        """`gating.matmul` with a device copy of `matrix`, which is one of `bank.matrices()`.

        Args:
            bank: has joined.
            x: (..., in), or (..., ranks) with `y`; its device gets the copy.
            matrix: (out, in), or (ranks, out) with `y`; on the CPU.
            y: (..., out) to add to, or None.
        """
        fetch = partial(self._fetch, self._group_of[bank], matrix, x.device)
        result: Tensor = _Matmul.apply(x, y, fetch)  # type: ignore[no-untyped-call]
        return result

    def _fetch(self, group: int, matrix: Tensor, device: torch.device) -> Tensor:
        """The device copy of a matrix of layer `group`, ready for use."""
        if group != self._here:
            self._arrive(group, device)
        return self._start(matrix, device).ready()

    def _arrive(self, group: int, device: torch.device) -> None:
        """Begin layer `group`: drop the copies that it does not need, and start those of it and of the layer that follows.

        A forward goes through the layers upwards, a backward downwards; the layer before this one tells which it is.
        """
        groups = list(self._groups.values())
        ahead = group - 1 if self._here == group + 1 else group + 1
        if ahead < 0:  # a backward has reached the first layer, and the next forward begins there
            ahead = 1
        elif ahead == len(
            groups
        ):  # a forward has reached the last layer: its backward follows, or the next token's forward
            ahead = group - 1 if groups[group][0].training else 0
        self._here = group
        self._keep_pace(device)
        near = [bank for i in {group, ahead} if i < len(groups) for bank in groups[i]]
        wanted = [matrix for bank in near for matrix in bank.matrices()]
        keys = {_key(matrix, device) for matrix in wanted}
        self._copies = {key: copy for key, copy in self._copies.items() if key in keys}
        for matrix in wanted:
            self._start(matrix, device)

    def _keep_pace(self, device: torch.device) -> None:
        """Wait until the GPU has begun the previous layer, so that the host is at most one layer ahead of it.

        A host that runs far ahead would allocate the copies of many layers before the GPU has used the first ones.
        """
        if device.type == "cuda":
            if device in self._reached:
                self._reached[device].synchronize()
            self._reached[device] = torch.cuda.current_stream(device).record_event()

    def _start(self, matrix: Tensor, device: torch.device) -> _Copy:
        """Start a copy, unless it exists already."""
        key = _key(matrix, device)
        if key not in self._copies:
            self._copies[key] = self._copied(matrix, device)
        return self._copies[key]

    def _copied(self, matrix: Tensor, device: torch.device) -> _Copy:
        if device.type != "cuda":
            return _Copy(matrix, matrix.to(device), None)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        # A stream of its own lets the copy run while the current layer computes.
        with torch.cuda.stream(stream):
            return _Copy(matrix, matrix.to(device, non_blocking=True), stream.record_event())


def _key(matrix: Tensor, device: torch.device) -> tuple[int, torch.Size, torch.device]:
    return matrix.data_ptr(), matrix.shape, device


class _Matmul(torch.autograd.Function):
    """`gating.matmul` by a frozen matrix that forward and backward fetch anew, so that autograd saves no device copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
        device = x.device.type
        ctx.fetch = fetch
        ctx.added = y is not None
        ctx.dtype = x.dtype
        ctx.computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return matmul(x, fetch(), y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        matrix = ctx.fetch().to(ctx.computed)
        grad_x = grad.to(ctx.computed) @ (matrix.T if ctx.added else matrix)
        return grad_x.to(ctx.dtype), grad if ctx.added else None, None
