"""Helpers for training in several processes. With one process, each of them does the obvious."""

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


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _started() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _started() else 1


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this is the process of rank 0."""
    return rank() == 0


def on_main[T](action: Callable[[], T]) -> T:
    """Run `action` in the main process. Every process must call this, and gets its result, or raises its exception."""
    if world_size() == 1:
        return action()
    # An exception has to travel as a value: otherwise the other processes would wait in the broadcast for ever.
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
    if world_size() == 1:
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
    """The `value` of every process, in the order of their ranks. Every process must call this."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def my_share(count: int) -> Iterator[tuple[int, bool]]:
    """The numbers below `count` that this process works on, each with whether its result counts.

    All processes get equally many, because the forward of a sharded model is a collective operation. To fill up, a process
    may get the last number once more; the caller must drop that result.
    """
    own, ranks = rank(), world_size()
    for turn in range(-(-count // ranks)):  # rounded up
        number = turn * ranks + own
        yield min(number, count - 1), number < count


def over_ranks[T, R](items: Sequence[T], compute: Callable[[T], R]) -> list[R]:
    """Compute a result for every item, divided among the processes by `my_share`. Every process must call this and gets all
    results, in order."""
    own: dict[int, R] = {}
    for number, counts in my_share(len(items)):
        result = compute(items[number])
        if counts:
            own[number] = result
    of_all = {number: result for part in gather_objects(own) for number, result in part.items()}
    return [of_all[number] for number in range(len(items))]


def check_same(what: str, seen: str, fix: str) -> None:
    """Check that all processes have the same `seen`. Every process must call this.

    Args:
        what: subject of the error.
        seen: this process's value.
        fix: remedy for the error.

    Raises:
        ValueError: on every rank, if two processes differ; names their machines.
    """
    found = gather_objects((socket.gethostname(), seen))
    for rank, (host, other) in enumerate(found):
        if other != found[0][1]:
            raise ValueError(
                f"{what} is not the same for all processes: {found[0][1]} for rank 0 on {found[0][0]}, {other} for rank "
                f"{rank} on {host}; {fix}"
            )


def shared_by_all(folder: Path) -> bool:
    """Whether all processes see what the main one writes into `folder`, as on one machine or a shared file system."""
    if world_size() == 1:
        return True

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix=".seen-", dir=folder)).name

    mark = on_main(leave_mark)
    seen = all(gather_objects((folder / mark).exists()))
    on_main((folder / mark).rmdir)
    return seen


def on_each_node(action: Callable[[], object]) -> None:
    """Run `action` in one process of each machine; all processes wait until it is done everywhere."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        action()
    barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every process's `tensor`, which is changed in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether DeepSpeed ZeRO-3 has divided any of the parameters among the processes."""
    # ZeRO-3 gives each parameter that it manages an attribute `ds_id`.
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def gathered(parameters: Sequence[Tensor], write: bool = False) -> Iterator[None]:
    """Gather parameters that DeepSpeed ZeRO-3 has sharded, for the length of a `with` block. Every process must enter it.

    Args:
        parameters: sharded or not.
        write: whether changes that rank 0 makes inside the block are sent to all processes.
    """
    if not sharded(parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def gather_full(parameter: Tensor) -> Tensor:
    """A CPU copy of a parameter, gathered if it is sharded. Every process must call this."""
    with gathered([parameter]):
        return parameter.detach().cpu().clone()
