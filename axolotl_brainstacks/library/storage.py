"""Reads and writes a library's files: a power cut leaves no file half-written, and an error names a damaged one."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from axolotl_brainstacks.guarded import MAX_JSON_BYTES, open_regular, printable, read
from axolotl_brainstacks.guarded import load_tensors as load_tensors
from axolotl_brainstacks.library.entries import FileRecord

# Most bytes of a file that holds neither tensors nor one JSON document, such as the discovery's records.
MAX_TEXT_BYTES = 2**30
_CHUNK_BYTES = 2**20


def record_of(data: bytes) -> FileRecord:
    """The SHA-256 and size of `data`."""
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def problem_of(path: Path, record: FileRecord, verify: bool = True) -> str | None:
    """What is wrong with a file, in one line, or None; its content is read, in chunks, only with `verify`."""
    name = printable(path)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != record.bytes:
                kind = "truncated" if size < record.bytes else "altered"
                return f"{name} is {kind} ({size} bytes instead of {record.bytes})"
            if verify and _sha256(file, record.bytes) != record.sha256:
                return f"{name} is altered (its SHA-256 differs from the manifest's)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def _sha256(file: BufferedReader, size: int) -> str | None:
    """The SHA-256 (hex) of a file's content, read in chunks; None if it is not `size` bytes long.

    No more than one byte beyond `size` is read, because some files of the kernel that call themselves empty have no end.
    """
    digest, left = hashlib.sha256(), size + 1
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if chunk is None:  # what a file that would block returns
            return None
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest() if left == 1 else None


def read_checked(path: Path, record: FileRecord) -> bytes:
    """The content of a file that is as `record` says.

    Raises:
        ValueError: with the message of `problem_of`, or if the file is none of tensors and larger than such a file may be.
    """
    if problem := problem_of(path, record, verify=False):
        raise ValueError(problem)
    # A sparse file takes no room on the disk, but all of its bytes in memory.
    limit = {".safetensors": record.bytes, ".json": MAX_JSON_BYTES}.get(path.suffix, MAX_TEXT_BYTES)
    if record.bytes > limit:
        raise ValueError(f"{printable(path)} is larger than the {limit} bytes that it may have")
    # The bytes that are returned are the ones checked: the file could change between two reads.
    if record_of(data := read(path, record.bytes)) != record:
        raise ValueError(f"{printable(path)} is altered (its SHA-256 differs from the manifest's)")
    return data


def tensors_to_bytes(tensors: dict[str, Tensor], owner: str) -> bytes:
    """The content of a safetensors file. Raises ValueError for a tensor that is not finite; `owner` is its owner's name there."""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{owner} has NaN or infinite values in {key} and is not saved: lower learning_rate or "
                "brainstacks.boosting.spike_threshold"
            )
    # Safetensors refuses tensors that share storage, as the slices of one bank of stacks do.
    copies = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    return safetensors.torch.save(copies, metadata={"format": "pt"})


def json_to_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys; sets become sorted lists."""
    return (json.dumps(value, indent=2, sort_keys=True, default=sorted) + "\n").encode()


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write and sync a file, and make its folder if there is none. Raises OSError naming file and size if the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # writing through a symbolic or hard link would change a file elsewhere
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"disk full, {len(data)} bytes are needed: free some space and run the same command again"
        raise OSError(error.errno, message, str(path)) from error
    return record_of(data)


def copy_durably(source: Path, target: Path, record: FileRecord) -> None:
    """Copy and sync a file.

    Raises:
        ValueError: naming `source` if it is not as `record` says.
        OSError: as `write_durably`.
    """
    try:
        data = read_checked(source, record)
    except ValueError as error:
        raise ValueError(f"{error}: restore the file from a copy of its library") from error
    write_durably(target, data)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise one clear OSError if the disk is full while the block writes checkpoints into `folder`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # PyTorch's zip writer and safetensors raise errors of their own, without errno, when a write fails.
        signs = ("No space left", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
        if not any(sign in str(error) for sign in signs):
            raise
        message = "disk full: free some space and run the same command again"
        raise OSError(errno.ENOSPC, message, str(folder)) from error


def first_free(name: Callable[[int], Path]) -> Path:
    """The first of the paths `name(1)`, `name(2)`, ... where nothing is."""
    return next(path for path in map(name, count(1)) if not os.path.lexists(path))


def make_writable(folder: Path) -> None:
    """Make a folder if there is none, and write a file there. Raises OSError if either fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".writable-"):
        pass


def sync_folder(path: Path) -> None:
    """Make renames into a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
