"""Files of a library: written so that a power cut cannot half-write them, read so that damage is named."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from axolotl_brainstacks.manifest import FileRecord


def record_of(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def problem_of(path: Path, record: FileRecord, verify: bool = True) -> str | None:
    """What is wrong with a file, in one line; its content is read, in chunks, only with `verify`."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != record.bytes:
        return f"{path} is {'truncated' if size < record.bytes else 'altered'} ({size} bytes instead of {record.bytes})"
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{path} is altered (its SHA-256 differs from the manifest's)"
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped on the CPU."""
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error


def tensors_to_bytes(tensors: dict[str, Tensor], owner: str) -> bytes:
    """A safetensors file in memory. Raises ValueError for a non-finite tensor; `owner` names what it belongs to."""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{owner} has NaN or infinite values in {key} and is not saved: lower learning_rate or "
                "brainstacks.boosting.spike_threshold"
            )
    # Cloned, because slices of one bank share their storage, which safetensors refuses.
    copies = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    return safetensors.torch.save(copies, metadata={"format": "pt"})


def json_to_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys; sets become sorted lists."""
    return (json.dumps(value, indent=2, sort_keys=True, default=sorted) + "\n").encode()


def write_durably(path: Path, data: bytes) -> FileRecord:
    """Write and sync a file, making its folder if need be. Raises OSError naming file and size on a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
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
    """Copy and sync a file. Raises ValueError naming `source` unless what was copied is what `record` says, and OSError
    as `write_durably` does."""
    if problem := problem_of(source, record, verify=False):
        raise ValueError(f"{problem}: restore the file from a copy of its library")
    if write_durably(target, source.read_bytes()) != record:
        raise ValueError(
            f"{source} is altered (its SHA-256 differs from the manifest's): restore the file from a copy of its library"
        )


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns what the libraries that write checkpoints say of a full disk, each in its way, into one clear OSError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        signs = ("No space left", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
        if not any(sign in str(error) for sign in signs):
            raise
        message = "disk full: free some space and run the same command again"
        raise OSError(errno.ENOSPC, message, str(folder)) from error


def make_writable(folder: Path) -> None:
    """Make a folder if need be, and try to write there; raises OSError."""
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
