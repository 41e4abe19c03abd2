"""The few things that differ when several processes train together. One process is the trivial case of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def is_main() -> bool:
    return world()[0] == 0


def on_main[T](action: Callable[[], T]) -> T:
    """Run `action` on the main process; its result, or its exception, reaches every rank."""
    if world()[1] == 1:
        return action()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects[T](value: T) -> list[T]:
    """Every rank's `value`, in the ranks' order."""
    if world()[1] == 1:
        return [value]
    values: list[T | None] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if world()[1] > 1:
        dist.barrier()


@contextmanager
def gathered(parameters: Sequence[Tensor], write: bool = False) -> Iterator[None]:
    """Whole parameters where DeepSpeed ZeRO-3 keeps them in shards; with `write`, changes of rank 0 are spread."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """A CPU copy of a parameter, gathered if it is sharded."""
    with gathered([parameter]):
        return parameter.detach().cpu().clone()
