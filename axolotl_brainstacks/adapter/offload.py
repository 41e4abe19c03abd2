"""Frozen stacks in CPU memory: copied to the device that computes, one decoder layer ahead of their use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from axolotl_brainstacks.adapter.gating import matmul

DECODER_LAYER = re.compile(r".*?\.\d+(?=\.)")


class Offloaded(Protocol):
    """What stays in CPU memory: the frozen stacks of one projection."""

    training: bool

    def matrices(self) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class _Copy:
    """`held` as it is on the device once `done`; it is kept so that no other tensor gets its address."""

    held: Tensor
    copy: Tensor
    done: torch.cuda.Event | None

    def ready(self) -> Tensor:
        if self.done is not None:
            stream = torch.cuda.current_stream(self.copy.device)
            stream.wait_event(self.done)
            self.copy.record_stream(stream)
        return self.copy


class Offload:
    """Device copies of the frozen stacks of two decoder layers: the one that computes, and the one that comes next.

    On a CPU a copy is the tensor itself.
    """

    def __init__(self) -> None:
        self._groups: dict[str, list[Offloaded]] = {}
        self._group_of: dict[Offloaded, int] = {}
        self._here: int | None = None
        self._copies: dict[tuple[int, torch.Size, torch.device], _Copy] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._reached: dict[torch.device, torch.cuda.Event] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without copies, streams and events, which cannot be copied with the model."""
        return vars(self) | {"_here": None, "_copies": {}, "_streams": {}, "_reached": {}}

    def join(self, bank: Offloaded, module_name: str) -> None:
        """Serve `bank`, of the projection `module_name`; banks join in the order in which the model computes."""
        layer = DECODER_LAYER.match(module_name)
        group = self._groups.setdefault(layer[0] if layer else module_name, [])
        group.append(bank)
        self._group_of[bank] = list(self._groups.values()).index(group)

    def forget(self) -> None:
        """The stacks that are held, or those that are on, have changed."""
        self._here, self._copies = None, {}

    @torch.compiler.disable
    def matmul(self, bank: Offloaded, x: Tensor, matrix: Tensor, y: Tensor | None = None) -> Tensor:
        """`gating.matmul` for one of `bank.matrices()`."""
        result: Tensor = _Matmul.apply(x, y, partial(self._fetch, self._group_of[bank], matrix, x.device))  # type: ignore[no-untyped-call]
        return result

    def _fetch(self, group: int, matrix: Tensor, device: torch.device) -> Tensor:
        if group != self._here:
            self._arrive(group, device)
        return self._start(matrix, device).ready()

    def _arrive(self, group: int, device: torch.device) -> None:
        """Start the copies of the layer that comes next: one further on, or one back in a backward pass."""
        groups = list(self._groups.values())
        ahead = group - 1 if self._here == group + 1 else group + 1
        if ahead < 0:
            ahead = 1
        elif ahead == len(groups):  # what follows a forward: its backward, or the next token's
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
        """Let the host run one layer ahead of the GPU at most: only what the GPU has passed makes room for new copies."""
        if device.type == "cuda":
            if device in self._reached:
                self._reached[device].synchronize()
            self._reached[device] = torch.cuda.current_stream(device).record_event()

    def _start(self, matrix: Tensor, device: torch.device) -> _Copy:
        """Begin to copy, unless that has been done already."""
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
        with torch.cuda.stream(stream):
            return _Copy(matrix, matrix.to(device, non_blocking=True), stream.record_event())


def _key(matrix: Tensor, device: torch.device) -> tuple[int, torch.Size, torch.device]:
    return matrix.data_ptr(), matrix.shape, device


class _Matmul(torch.autograd.Function):
    """Multiplication by a frozen matrix that is fetched for forward and again for backward, so that none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
        device = x.device.type
        ctx.fetch, ctx.added, ctx.dtype = fetch, y is not None, x.dtype
        ctx.computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return matmul(x, fetch(), y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        matrix = ctx.fetch().to(ctx.computed)
        to_x = grad.to(ctx.computed) @ (matrix.T if ctx.added else matrix)
        return to_x.to(ctx.dtype), grad if ctx.added else None, None
