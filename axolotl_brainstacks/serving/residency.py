"""Which stacks of a library are in memory: only those that were needed, read from their files when they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.segment import StackTensors
from axolotl_brainstacks.adapter.tensors import check_values, stack_pairs
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.guarded import load_tensors
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.manifest import WEIGHTS
from axolotl_brainstacks.library.storage import problem_of

# What changes with a file's content: modification and change time in ns, size in bytes, and which file it is.
Signature = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class _Part:
    """One projection of a stack. `tensors` holds no data: its a and b are on the meta device."""

    layer: BrainstacksLinear
    tensors: StackTensors


class ResidentStacks:
    """The stacks of `library` that the banks of `tuner` hold; least recently used ones leave under `max_bytes`.

    A file's hash and values are checked when it is read first, and again when it is read after a change on disk.

    Attributes:
        max_bytes: most memory for stacks; None for no limit. It holds from the next selection of stacks.
        bytes_read: read from stack files so far.
        peak_bytes: most memory that stacks ever took.
    """

    def __init__(self, tuner: StackTuner, library: Library) -> None:
        """Wrap every projection that a stack covers; no weight is read.

        Raises:
            ValueError: if a stack is missing, truncated, or does not fit the model, or its config is wrong.
        """
        # Not the library itself: its file lock cannot be copied with the model.
        self.path, self.manifest = library.path, library.manifest
        self.max_bytes: int | None = None
        self.bytes_read = 0
        self.peak_bytes = 0
        self._used: dict[str, int] = {}  # name -> bytes, least recently used first
        self._verified: dict[str, Signature] = {}
        # Whether an exchange has begun and not ended: what the banks hold is unknown then.
        self._torn = False
        self._parts: dict[str, list[_Part]] = {}
        last: dict[BrainstacksLinear, StackTensors] = {}
        for place, entry in enumerate(self.manifest.active_stacks):
            config = BrainstacksConfig.of_stack(entry.name, library.stack_config(entry.name))
            pairs = stack_pairs(entry.name, library.stack_tensors(entry.name, verify=False))
            self._parts[entry.name] = []
            for module_name, (a, b) in pairs.items():
                layer = tuner.projection_of(entry.name, module_name)
                shape, before = layer.stack_shape(entry.name, config, a, b), last.get(layer)
                segment = 0 if before is None else before.segment + (before.shape != shape)
                last[layer] = StackTensors(entry.name, shape, a.to("meta"), b.to("meta"), segment, place)
                self._parts[entry.name].append(_Part(layer, last[layer]))

    @property
    def names(self) -> list[str]:
        """The stacks in memory, least recently used first."""
        return list(self._used)

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(self._used.values())

    def ensure(self, names: Sequence[str]) -> None:
        """Have the stacks `names` in memory. Stacks that are not the library's are none of its business.

        Raises:
            ValueError: if they need more than `max_bytes`, or a file is missing, altered, or has values that are not finite;
                then nothing has changed. After any other exception the next call reads anew what it needs.
        """
        if self._torn:
            self._drop_all()
        needed = {name: self._size(name) for name in names if name in self._parts}
        if self.max_bytes is not None and sum(needed.values()) > self.max_bytes:
            raise ValueError(
                f"max_resident_bytes is {self.max_bytes}, but the stacks {', '.join(needed)} that are needed at once take "
                f"{sum(needed.values())}: raise it"
            )
        rest = {name: size for name, size in self._used.items() if name not in needed}
        gone = []
        while self.max_bytes is not None and sum(rest.values()) + sum(needed.values()) > self.max_bytes:
            gone.append(next(iter(rest)))
            del rest[gone[-1]]
        self._exchange(gone, [name for name in needed if name not in self._used], rest | needed)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def forget(self, name: str) -> None:
        """A stack was detached for good."""
        self._parts.pop(name, None)
        self._used.pop(name, None)

    def _size(self, name: str) -> int:
        return sum(part.layer.bank_bytes(part.tensors.shape) for part in self._parts[name])

    def _exchange(self, gone: Sequence[str], new: Sequence[str], used: dict[str, int]) -> None:
        coming: dict[BrainstacksLinear, list[StackTensors]] = {}
        for name, pairs in {name: self._read(name) for name in new}.items():
            for part in self._parts[name]:
                a, b = pairs[part.layer.module_name]
                coming.setdefault(part.layer, []).append(replace(part.tensors, a=a, b=b))
        leaving = {part.layer for name in gone for part in self._parts[name]}
        self._torn = True
        for layer in coming.keys() | leaving:
            layer.update_bank(gone, coming.get(layer, []))
        self._used = used
        self._torn = False

    def _drop_all(self) -> None:
        """Empty the banks of what is the library's."""
        for layer in {part.layer for parts in self._parts.values() for part in parts}:
            layer.update_bank(self._parts.keys(), [])
        self._used = {}
        self._torn = False

    def _read(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Map a stack's file."""
        library = Library(self.path, self.manifest)
        file = library.stack_path(name) / WEIGHTS
        before = _signature(file)
        known = before is not None and before == self._verified.get(name)
        tensors = library.stack_tensors(name, verify=not known)
        if not known and (parts := self._parts[name]):
            check_values(f"Stack {name}", tensors, parts[0].layer.bank_dtype)
        if before is None or _signature(file) != before:
            raise ValueError(f"{file} was changed while it was read: restore it from a copy of the library")
        self._verified[name] = before
        self.bytes_read += self.manifest.stack(name).files[WEIGHTS].bytes
        return stack_pairs(name, tensors)


def check_root(library: Library) -> None:
    """Raise a ValueError if a file that lets PEFT load the library as a whole is missing, altered or damaged.

    Libraries that were written before their manifest listed these files pass: what the files hold is checked besides.
    """
    for file, record in library.manifest.root.items():
        if problem := problem_of(library.path / file, record):
            raise ValueError(
                f"{problem}: restore the file from a copy of the library, or run `axolotl train` on its YAML again, which "
                "writes it anew"
            )
    if (weights := library.path / WEIGHTS).is_file():
        load_tensors(weights)  # PEFT reads it next, in its own way


def _signature(file: Path) -> Signature | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
