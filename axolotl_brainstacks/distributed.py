"""The few things that differ when several processes train together. One process is the trivial case of each."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
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


def on_every_rank[T](action: Callable[[], T]) -> T:
    """Run `action` on every rank. Raises ValueError on all of them when any raises one: the first rank's."""
    if world()[1] == 1:
        return action()
    mistake, result = None, []
    try:
        result.append(action())
    except ValueError as error:
        mistake = str(error)
    first = next((found for found in gather_objects(mistake) if found is not None), None)
    if first is not None:
        raise ValueError(first)
    return result[0]


def gather_objects[T](value: T) -> list[T]:
    """Every rank's `value`, in the ranks' order."""
    if world()[1] == 1:
        return [value]
    values: list[T | None] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def check_same(what: str, seen: str, mend: str) -> None:
    """Raises ValueError on every rank unless all ranks, on whatever machines, have `seen` the same."""
    found = gather_objects((socket.gethostname(), seen))
    for rank, (host, other) in enumerate(found):
        if other != found[0][1]:
            raise ValueError(
                f"{what} is not the same for all processes: {found[0][1]} for rank 0 on {found[0][0]}, {other} for rank "
                f"{rank} on {host}; {mend}"
            )


def shared_by_all(folder: Path) -> bool:
    """Whether all ranks see what the main process writes into `folder`: one machine, or a shared file system."""
    if world()[1] == 1:
        return True

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix=".seen-", dir=folder)).name

    mark = on_main(leave_mark)
    seen = all(gather_objects((folder / mark).exists()))
    on_main((folder / mark).rmdir)
    return seen


def on_each_node(action: Callable[[], object]) -> None:
    """Run `action` in one process of each machine, and let all go on when it is done."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        action()
    barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if world()[1] > 1:
        dist.barrier()


def sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps any of them in shards."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def gathered(parameters: Sequence[Tensor], write: bool = False) -> Iterator[None]:
    """Whole parameters where DeepSpeed ZeRO-3 keeps them in shards; with `write`, changes of rank 0 are spread."""
    if not sharded(parameters):
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
