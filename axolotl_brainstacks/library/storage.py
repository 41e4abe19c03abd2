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

from axolotl_brainstacks.guarded import load_tensors as load_tensors
from axolotl_brainstacks.guarded import open_regular, printable, read
from axolotl_brainstacks.library.manifest import FileRecord


def record_of(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def problem_of(path: Path, record: FileRecord, verify: bool = True) -> str | None:
    """What is wrong with a file, in one line; its content is read, in chunks, only with `verify`."""
    name = printable(path)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != record.bytes:
                kind = "truncated" if size < record.bytes else "altered"
                return f"{name} is {kind} ({size} bytes instead of {record.bytes})"
            if verify and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return f"{name} is altered (its SHA-256 differs from the manifest's)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def read_checked(path: Path, record: FileRecord) -> bytes:
    """The content of a file that is what `record` says. Raises ValueError as `problem_of` puts it."""
    if problem := problem_of(path, record, verify=False):
        raise ValueError(problem)
    # What is checked is what was read: the file could change in between.
    if record_of(data := read(path, record.bytes)) != record:
        raise ValueError(f"{printable(path)} is altered (its SHA-256 differs from the manifest's)")
    return data


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
        path.unlink(missing_ok=True)  # a link, or a second name of the file, would lead the write elsewhere
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
    """Copy and sync a file. Raises ValueError naming `source` unless it is what `record` says, and OSError as
    `write_durably` does."""
    try:
        data = read_checked(source, record)
    except ValueError as error:
        raise ValueError(f"{error}: restore the file from a copy of its library") from error
    write_durably(target, data)


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
