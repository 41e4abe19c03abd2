"""The stacks of a library that are in memory: each is read from its file when it is first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.folder import find_weights
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.segment import StackTensors
from axolotl_brainstacks.adapter.tensors import check_values, stack_pairs
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.guarded import load_tensors
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import WEIGHTS
from axolotl_brainstacks.library.storage import problem_of

# Changes whenever a file's content does: modification and status-change time in ns, size in bytes, inode, device.
Signature = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class _Part:
    """One projection of a stack.

    Attributes:
        layer: the wrapped projection.
        tensors: the stack's shape and place in the layer's bank; its a and b are on the meta device and hold no data.
    """

    layer: BrainstacksLinear
    tensors: StackTensors


class ResidentStacks:
    """A cache of the library's stacks in the banks of the tuner's layers, with least-recently-used eviction.

    When a file is read for the first time, or again after it has changed on disk, its hash and values are checked.

    Attributes:
        path, manifest: of the library.
        max_bytes: most memory for stacks, in bytes; None: no limit. A new value applies from the next selection on.
        bytes_read: bytes read from stack files so far.
        peak_bytes: most memory that the stacks have taken so far, in bytes.
    """

    def __init__(self, tuner: StackTuner, library: Library) -> None:
        """Wrap every projection that a stack covers. No weight is read.

        Args:
            tuner: of the model.
            library: made for this base model.

        Raises:
            ValueError: if a stack is missing, truncated, or does not fit the model, or its config is wrong.
        """
        # The library object itself has a file lock, which `copy.deepcopy` of the model cannot copy.
        self.path, self.manifest = library.path, library.manifest
        self.max_bytes: int | None = None
        self.bytes_read = 0
        self.peak_bytes = 0
        self._used: dict[str, int] = {}  # name -> bytes, least recently used first
        self._verified: dict[str, Signature] = {}
        # True while stacks are exchanged. If it is true afterwards, an interrupt came and the banks' content is unknown.
        self._torn = False
        self._parts: dict[str, list[_Part]] = {}
        last: dict[BrainstacksLinear, StackTensors] = {}
        for place, entry in enumerate(self.manifest.active_stacks):
            config = BrainstacksConfig.of_stack(entry.name, library.stack_config(entry.name))
            pairs = stack_pairs(entry.name, library.stack_tensors(entry.name, verify=False))
            self._parts[entry.name] = []
            for module_name, (a, b) in pairs.items():
                layer = tuner.projection_of(entry.name, module_name)
                shape = layer.stack_shape(entry.name, config, a, b)
                before = last.get(layer)
                # Every stack's segment is fixed here, for the whole library, so that it does not depend on the order in which
                # stacks are read later.
                segment = 0 if before is None else before.segment + (before.shape != shape)
                last[layer] = StackTensors(entry.name, shape, a.to("meta"), b.to("meta"), segment, place)
                self._parts[entry.name].append(_Part(layer, last[layer]))

    @property
    def names(self) -> list[str]:
        """The stacks in memory, least recently used first."""
        return list(self._used)

    @property
    def bytes(self) -> int:
        """Memory that the resident stacks take."""
        return sum(self._used.values())

    def ensure(self, names: Sequence[str]) -> None:
        """Read the stacks `names` into memory, and evict others if `max_bytes` requires it.

        Args:
            names: of stacks; those that are not in the library are ignored.

        Raises:
            ValueError: if the stacks need more than `max_bytes`, or a file is missing, altered, or has values that are not
                finite. Nothing has changed then. After any other exception the next call reads again what it needs.
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
        evicted = []
        while self.max_bytes is not None and sum(rest.values()) + sum(needed.values()) > self.max_bytes:
            evicted.append(next(iter(rest)))  # the least recently used
            del rest[evicted[-1]]
        self._exchange(evicted, [name for name in needed if name not in self._used], rest | needed)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def forget(self, name: str) -> None:
        """Drop a stack that was detached from the model."""
        self._parts.pop(name, None)
        self._used.pop(name, None)

    def _size(self, name: str) -> int:
        return sum(part.layer.bank_bytes(part.tensors.shape) for part in self._parts[name])

    def _exchange(self, evicted: Sequence[str], new: Sequence[str], used: dict[str, int]) -> None:
        """Replace the stacks `evicted` by `new`; `used` is `_used` afterwards."""
        # All files are read and checked before the first bank changes, so that a damaged one changes nothing.
        read = {name: self._read(name) for name in new}
        added: dict[BrainstacksLinear, list[StackTensors]] = {}
        for name, pairs in read.items():
            for part in self._parts[name]:
                a, b = pairs[part.layer.module_name]
                added.setdefault(part.layer, []).append(replace(part.tensors, a=a, b=b))
        shrunk = {part.layer for name in evicted for part in self._parts[name]}
        self._torn = True
        for layer in added.keys() | shrunk:
            layer.update_bank(evicted, added.get(layer, []))
        self._used = used
        self._torn = False

    def _drop_all(self) -> None:
        """Remove all stacks of the library from the banks."""
        for layer in {part.layer for parts in self._parts.values() for part in parts}:
            layer.update_bank(self._parts.keys(), [])
        self._used = {}
        self._torn = False

    def _read(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of a stack by module name, memory-mapped from its file and checked as the class says."""
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
    """Check the files that make a library's folder a PEFT adapter: its config and its (empty) weights.

    The manifest of a library from an older version does not list them; only their content is checked then.

    Raises:
        ValueError: if one of them is missing, altered or damaged.
    """
    for file, record in library.manifest.root.items():
        if problem := problem_of(library.path / file, record):
            raise ValueError(
                f"{problem}: restore the file from a copy of the library, or run `axolotl train` on its YAML again, which "
                "writes it anew"
            )
    if (weights := find_weights(library.path)) is not None:
        load_tensors(weights)  # PEFT reads this file next, with less careful checks


def _signature(file: Path) -> Signature | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
