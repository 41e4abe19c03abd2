"""Reads files that may come from a stranger, those of a library or of an adapter to import. No other code opens them.

Only regular files are opened, because opening a FIFO or a device could block for ever. Sizes and nesting are bounded
before the content is parsed. A link to a *file* is followed, because the Hugging Face Hub's cache consists of such links. A
link to a *folder* inside a library is refused, because writing or deleting there would change another folder.
"""

from __future__ import annotations

import json
import math
import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 32
# Most values of a JSON document. A value of three characters, "[],", takes about 130 bytes in memory.
MAX_VALUES = 2**21
# A safetensors header takes about 150 bytes for each tensor.
MAX_HEADER_BYTES = 32 * 2**20


def printable(text: object) -> str:
    """`text` on one line, safe to print: control characters, also those that reorder text, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text: object, most: int = 300) -> str:
    """`printable` text of at most `most` characters, with "…" in place of what was in the middle."""
    shown = printable(text)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[-most // 2 :]}"


def folder_problem(root: Path, relative: str) -> str | None:
    """Check that no folder between `root` and its file `relative` is a link.

    `root` itself may be a link, because the user has named it.

    Returns:
        What is wrong, in one line; None if nothing is, or a folder does not exist.
    """
    for parent in reversed(PurePosixPath(relative).parents[:-1]):
        try:
            mode = (root / parent).lstat().st_mode
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no folder"
            return f"{printable(root / parent)} is {kind}, and a library has only real folders: put the folder itself there"
    return None


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError if it cannot be opened, ValueError if it is not a regular file."""
    # Opening a device can have effects, so the check comes first; the file may be replaced in between, so it is repeated on
    # the open file.
    if stat.S_ISREG(path.stat().st_mode):
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise ValueError(f"{printable(path)} is no regular file: remove it, or restore the file from a copy")


def read(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`.
        ValueError: as `open_regular`, or if the file is larger, or has another size than its content.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(
                f"{printable(path)} is larger than the {limit} bytes that it may have: restore the file from a copy"
            )
        # Files of the kernel, such as those in /proc, count as regular and as empty, and some have no end.
        if (data := file.read(size + 1)) is not None and len(data) == size:
            return data
    raise ValueError(
        f"{printable(path)} does not have the {size} bytes that it says: put a real file there, and run again"
    )


def parse_json(data: bytes | str, non_finite: bool = False) -> Any:
    """The value of a JSON document.

    Args:
        non_finite: whether NaN and infinite numbers are allowed, as Python writes them.

    Raises:
        ValueError: for malformed JSON, text that is not Unicode, a key that an object has twice, nesting deeper than
            `MAX_DEPTH`, more than `MAX_VALUES` values, or a number that is not finite.
    """

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)) and not non_finite:
            raise ValueError(f"{text[:20]} is no finite number")
        return number

    try:
        text = data if isinstance(data, str) else data.decode()
        check_values(text)
        value = json.loads(text, object_pairs_hook=_unique, parse_float=finite, parse_constant=finite)
        if "\\u" in text:  # an escape can stand for half of a surrogate pair, which no encoding can write again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(printable(f"{type(error).__name__}: {error}")) from None
    level, depth = [value], 0
    while level := [item for inner in level for item in _items(inner)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def check_values(text: str) -> None:
    """Raises ValueError if JSON text has more than `MAX_VALUES` values."""
    # Each value but the first of its list or object follows a comma. Commas in strings count too, which few texts notice.
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises OSError and ValueError as `read` and `parse_json`, naming the file."""
    data = read(path, limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): restore the file from a copy") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by key, memory-mapped on the CPU. Raises ValueError if the file is damaged."""
    from safetensors.torch import load_file

    with open_regular(path) as file:
        _check_header(path, file.read(8), os.fstat(file.fileno()).st_size)
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own error, or any of torch's for an impossible shape or dtype
        raise ValueError(f"{printable(path)} is damaged ({printable(error)}): restore it from a copy") from error


def parse_tensors(data: bytes, name: object) -> dict[str, Tensor]:
    """The tensors of a safetensors file's content, by key. Raises ValueError, naming it `name`, if it is damaged."""
    from safetensors.torch import load

    _check_header(name, data[:8], len(data))
    try:
        return load(data)
    except Exception as error:  # as in `load_tensors`
        raise ValueError(f"{printable(name)} is damaged ({printable(error)}): restore it from a copy") from error


def _check_header(name: object, start: bytes, size: int) -> None:
    """Raises ValueError if the header's length, the first 8 bytes, does not fit a file of `size` bytes."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{printable(name)} is damaged (no safetensors header): restore it from a copy")


def _items(value: Any) -> list[Any]:
    """The values directly inside a JSON value."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice: two programs may read two different values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        last = {key: place for place, (key, _) in enumerate(pairs)}
        twice = next(key for place, (key, _) in enumerate(pairs) if last[key] != place)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found
