"""The library on disk: a folder of frozen stacks that is whole at every moment.

Every change is written beside the library's files, synced, moved into place, and takes effect when the new
`manifest.json` replaces the old one. What the manifest does not list is a leftover of a killed writer; the next one
removes it.
"""

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self

from filelock import FileLock, Timeout
from torch import Tensor

from axolotl_brainstacks.args import FrozenDtype
from axolotl_brainstacks.manifest import (
    MANIFEST,
    STACK_PATTERN,
    BaseModelInfo,
    DomainEntry,
    FileRecord,
    Manifest,
    NullSpaceEntry,
    RoundRecord,
    RouterEntry,
    StackEntry,
)
from axolotl_brainstacks.storage import (
    json_to_bytes,
    load_tensors,
    make_writable,
    problem_of,
    record_of,
    sync_folder,
    tensors_to_bytes,
    write_durably,
)

LOG = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STAGE = ".tmp"
# Folders in which every file is listed in the manifest, and what we call what we put there.
OWNED = {
    "stacks": re.compile(STACK_PATTERN),
    "nullspace": re.compile(r"[a-z][a-z0-9_]{0,31}-[0-9a-f]{12}\.safetensors"),
    "validation": re.compile(r"[a-z][a-z0-9_]{0,31}\.safetensors"),
}


class Library:
    """A library folder and its manifest, as last read or written.

    Reading needs no lock. Every method that changes the library asserts that it runs inside `writing()`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        # One lock object per folder and process: a second Library on the same folder is the same writer.
        self._lock = FileLock(path / ".lock", timeout=0, is_singleton=True, thread_local=False)

    @staticmethod
    def exists(path: str | Path) -> bool:
        return (Path(path) / MANIFEST).is_file()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a library. Raises ValueError when it is none, its manifest is damaged, or a newer version wrote it."""
        folder = Path(path).absolute()
        return cls(folder, Manifest.read(folder))

    @classmethod
    def create(cls, path: str | Path, base: BaseModelInfo, frozen_dtype: FrozenDtype = None) -> Self:
        """Make an empty library. Raises ValueError when the folder is a library already, or `check_new` does."""
        folder = Path(path).absolute()
        if not cls.exists(folder):
            cls.check_new(folder)
        library = cls(folder, Manifest(base=base, frozen_dtype=frozen_dtype))
        with library._locked():
            if cls.exists(folder):
                raise ValueError(f"{folder} is a library already: open it, or name a new folder in brainstacks.library")
            library._commit(library.manifest)
            library._sweep()
        return library

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Make the folder of a library to come, if need be. Raises ValueError when it cannot be made or written, or holds
        anything else."""
        folder = Path(path).absolute()
        try:
            make_writable(folder)
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be made or written ({error.strerror}): name another folder in brainstacks.library"
            ) from error
        if any((folder / "stacks").glob("s*_*")):
            raise ValueError(
                f"{folder / MANIFEST} is missing beside stacks: restore it from a copy, or name another folder in "
                "brainstacks.library"
            )
        if any(not child.name.startswith(".") for child in folder.iterdir()):
            raise ValueError(f"{folder} is no library and not empty: name a new folder in brainstacks.library")

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Self]:
        """Be the one writer of this library; re-entrant within a process. The lock dies with its process.

        On entry the manifest is read again and the leftovers of killed writers are removed. Raises ValueError when
        another process is writing.
        """
        with self._locked():
            self._sweep()
            yield self

    def add_domain(self, entry: DomainEntry, validation: bytes | None = None) -> None:
        """List a domain, with the rows (`evaluation.pack_rows`) that its losses are measured on."""
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            if validation is not None:
                entry.validation = self._put(f"validation/{entry.name}.safetensors", validation)

    def import_domain(self, entry: DomainEntry, config: dict[str, Any], tensors: dict[str, Tensor]) -> StackEntry:
        """List a domain together with its only stack, trained elsewhere; the router is stale then. Arguments and errors
        as `add_stack`."""
        data = _stack_files(entry.name, config, tensors)
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            stack = self._put_stack(manifest, entry.name, 1, data)
            entry.context = [stack.name]
            if manifest.router:
                manifest.router.stale = True
        return stack

    def update_domain(self, name: str, **changes: Any) -> DomainEntry:
        assert "name" not in changes, "stacks carry their domain's name"
        with self._changing() as manifest:
            entry = DomainEntry.model_validate(manifest.domain(name).model_dump() | changes)
            manifest.domains[manifest.domains.index(manifest.domain(name))] = entry
        return entry

    def record_round(self, domain: str, record: RoundRecord) -> None:
        """Note a round whose stack was not kept."""
        assert not record.kept and record.stack is None, record
        with self._changing() as manifest:
            manifest.domain(domain).rounds.append(record)

    def add_stack(
        self,
        domain: str,
        round: int,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        record: RoundRecord,
        context: list[str] | None = None,
    ) -> StackEntry:
        """Freeze a stack: a plain PEFT folder `stacks/<name>`, listed last in the manifest with its round's record.

        `config` is the PEFT config (sets become sorted lists), `tensors` the adapter's state dict on any device,
        `context` the stacks that were on while it trained; its own name is added. Raises
        ValueError for a non-finite tensor or an all-zero B, OSError when the disk is full; then nothing has changed.
        """
        assert record.kept and record.round == round, record
        data = _stack_files(domain, config, tensors)
        with self._changing() as manifest:
            entry = self._put_stack(manifest, domain, round, data)
            manifest.domain(domain).rounds.append(record.model_copy(update={"stack": entry.name}))
            manifest.domain(domain).context = [*(context or []), entry.name]
        return entry

    def write_nullspace(
        self, domain: str, tensors: dict[str, Tensor], columns: int, energy: float, capacity_left: float
    ) -> NullSpaceEntry:
        """Keep the basis that `domain` trains against, in place of an older one. Raises as `add_stack` does."""
        data = tensors_to_bytes(tensors, f"the null space of domain {domain!r}")
        # Named by content: the file that the manifest lists now is never overwritten.
        file = f"nullspace/{domain}-{record_of(data).sha256[:12]}.safetensors"
        with self._changing() as manifest:
            record = self._put(file, data)
            entry = NullSpaceEntry(
                file=file, record=record, columns=columns, energy=energy, capacity_left=capacity_left
            )
            manifest.domain(domain).nullspace = entry
        return entry

    def write_file(self, relative: str, data: bytes) -> FileRecord:
        """Write a file of the report or the router, atomically. A router that listed the file is dropped first: a kill
        before `set_router` then leaves a library without a router, not a damaged one."""
        assert relative.startswith(("report/", "router/")) and ".." not in PurePosixPath(relative).parts, relative
        with self._changing() as manifest:
            if manifest.router and relative in manifest.router.files:
                manifest.router = None
        with self._changing():
            return self._put(relative, data)

    def set_router(self, entry: RouterEntry | None) -> None:
        with self._changing() as manifest:
            manifest.router = entry

    def set_frozen_dtype(self, dtype: FrozenDtype) -> None:
        """Say how stacks are kept in memory, before there is one."""
        if self.manifest.frozen_dtype != dtype:
            assert not self.manifest.stacks
            with self._changing() as manifest:
                manifest.frozen_dtype = dtype

    def write_root_config(self, config: dict[str, Any]) -> None:
        """Make the library itself a folder that `PeftModel.from_pretrained(base, library)` accepts."""
        data = {WEIGHTS: tensors_to_bytes({}, "the library"), CONFIG: json_to_bytes(config)}
        records = {file: record_of(content) for file, content in data.items()}
        if self.manifest.root == records and not self._problems(records):
            return
        with self._changing() as manifest:  # a kill before the end leaves files that nothing is expected of
            manifest.root = {}
        with self._changing() as manifest:
            manifest.root = {file: self._put(file, content) for file, content in data.items()}

    def remove_domain(self, name: str) -> list[str]:
        """Remove a domain with its stacks and null space; the router is stale then. Returns its dependents."""
        with self._changing() as manifest:
            dependents = manifest.dependents(name)
            manifest.domains.remove(manifest.domain(name))
            manifest.stacks = [s for s in manifest.stacks if s.domain != name]
            if manifest.router:
                manifest.router.stale = True
        return dependents

    # Reading

    def stack_path(self, name: str) -> Path:
        return self.path / "stacks" / self.manifest.stack(name).name

    def stack_config(self, name: str) -> dict[str, Any]:
        """The PEFT config of a stack. Raises ValueError when its file is missing or altered."""
        record = self.manifest.stack(name).files[CONFIG]
        path = self._checked(f"stacks/{name}/{CONFIG}", record, verify=False)
        data = path.read_bytes()
        if record_of(data) != record:
            self._checked(f"stacks/{name}/{CONFIG}", record)
            raise ValueError(f"{path} was changed while it was read: restore it from a copy of the library")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): restore it from a copy of the library") from error

    def stack_tensors(self, name: str, verify: bool = True) -> dict[str, Tensor]:
        """The tensors of a stack, memory-mapped on the CPU. Raises ValueError naming a missing or truncated file and,
        with `verify`, which reads the whole file once, an altered one."""
        record = self.manifest.stack(name).files[WEIGHTS]
        return load_tensors(self._checked(f"stacks/{name}/{WEIGHTS}", record, verify))

    def nullspace(self, domain: str) -> dict[str, Tensor]:
        """The basis that a domain was trained against. Raises ValueError when it has none, or its file is damaged."""
        entry = self.manifest.domain(domain).nullspace
        if entry is None:
            raise ValueError(f"domain {domain!r} of {self.path} was trained without a null space")
        return load_tensors(self._checked(entry.file, entry.record))

    def validation(self, domain: str) -> bytes:
        """The validation rows of a domain, for `evaluation.unpack_rows`. Raises ValueError when it has none or they are
        damaged."""
        record = self.manifest.domain(domain).validation
        if record is None:
            raise ValueError(f"domain {domain!r} of {self.path} has no validation rows")
        return self._checked(f"validation/{domain}.safetensors", record).read_bytes()

    def verify(self) -> list[str]:
        """What is wrong with the library's files, one line each; empty when every file is whole and none looks like
        ours without being listed."""
        unknown = [
            f"{path} is unknown to {MANIFEST}: move it out of the library"
            for folder in OWNED
            for path in sorted((self.path / folder).rglob("*"))
            if path.name == CONFIG or path.suffix == ".safetensors"
            if path.relative_to(self.path).as_posix() not in self.manifest.files
        ]
        router = [
            f"{problem}: fit the router again with `axolotl brainstacks-router CONFIG`"
            for problem in self._problems(self.manifest.router_files)
        ]
        return self.damage() + router + unknown + self._root_problems()

    def damage(self) -> list[str]:
        """The part of `verify` that a training run must not meet: the root's files it writes anew, the router it does not
        read, others it leaves alone."""
        files, router = self.manifest.files, self.manifest.router_files
        return self._problems({file: record for file, record in files.items() if file not in router})

    def _root_problems(self) -> list[str]:
        """What PEFT reads of the library's own folder: listed, whole, and standing for this library."""
        mend = "run `axolotl train` on its YAML again, which writes it anew"
        if problems := self._problems(self.manifest.root):
            return problems
        found = [file for file in (CONFIG, WEIGHTS) if (self.path / file).exists() and file not in self.manifest.root]
        if found:
            return [f"{self.path / file} is unknown to {MANIFEST}: {mend}" for file in found]
        if CONFIG in self.manifest.root:
            try:
                named = json.loads((self.path / CONFIG).read_bytes())["library"]
            except (ValueError, KeyError, TypeError, RecursionError):
                named = None
            if named != ".":
                return [f"{self.path / CONFIG} names the library {named!r} instead of '.': {mend}"]
        return []

    def _problems(self, files: dict[str, FileRecord]) -> list[str]:
        return [problem for file, record in files.items() if (problem := problem_of(self.path / file, record))]

    # The machinery of a change

    @contextmanager
    def _locked(self) -> Iterator[None]:
        owner = self.path / ".lock.owner"
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.path} is being written by another process ({_owner(owner)}): wait until it has ended, "
                "or stop it, then run the same command again"
            ) from None
        try:
            # Only a courtesy to whoever is refused: a full disk must not stop a writer that came to free space.
            with suppress(OSError):
                owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _changing(self) -> Iterator[Manifest]:
        """The manifest as it is on disk, to be changed; it is committed at the end, or nothing of it stays."""
        assert self._lock.is_locked, "the library is changed outside `with library.writing()`"
        before = Manifest.read(self.path)
        manifest = before.model_copy(deep=True)
        try:
            yield manifest
            if manifest != before:
                self._commit(Manifest.model_validate(manifest.model_dump()))
        finally:
            self._sweep()

    def _append_domain(self, manifest: Manifest, entry: DomainEntry) -> None:
        if entry.name in (domain.name for domain in manifest.domains):
            raise ValueError(
                f"domain {entry.name!r} is in {self.path} already: choose another name, or remove it with "
                f"`axolotl brainstacks-library {self.path} remove {entry.name}`"
            )
        manifest.domains.append(entry)

    def _put_stack(self, manifest: Manifest, domain: str, round: int, data: dict[str, bytes]) -> StackEntry:
        name = manifest.next_stack_name(domain)
        staged = self.path / STAGE / name
        files = {file: write_durably(staged / file, content) for file, content in data.items()}
        sync_folder(staged)
        self._publish(staged, f"stacks/{name}")
        entry = StackEntry(name=name, domain=domain, round=round, files=files)
        manifest.stacks.append(entry)
        manifest.next_stack += 1
        return entry

    def _commit(self, manifest: Manifest) -> None:
        self._put(MANIFEST, json_to_bytes(json.loads(manifest.model_dump_json())))

    def _put(self, relative: str, data: bytes) -> FileRecord:
        staged = self.path / STAGE / PurePosixPath(relative).name
        record = write_durably(staged, data)
        self._publish(staged, relative)
        return record

    def _publish(self, staged: Path, relative: str) -> None:
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
        for folder in PurePosixPath(relative).parents:
            sync_folder(self.path / folder)

    def _sweep(self) -> None:
        """Read the manifest again and remove what a killed writer left: ours by its name, and not listed."""
        self.manifest = Manifest.read(self.path)
        listed = {PurePosixPath(file).parts[:2] for file in self.manifest.files}
        found = (p for folder, name in OWNED.items() for p in (self.path / folder).glob("*") if name.fullmatch(p.name))
        unlisted = [p for p in found if (p.parent.name, p.name) not in listed]
        numbers = {p: int(p.name[1:].partition("_")[0]) for p in unlisted if p.parent.name == "stacks"}
        if newer := [p for p, number in numbers.items() if number > self.manifest.next_stack]:
            raise ValueError(
                f"{self.path / MANIFEST} is older than {min(newer)}: put the newest {MANIFEST} back, or move the stacks that "
                "it does not know out of the library"
            )
        for path in numbers:
            LOG.warning("%s was left by a killed run: removed", path)
        for path in [*unlisted, self.path / STAGE]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _checked(self, relative: str, record: FileRecord, verify: bool = True) -> Path:
        if problem := problem_of(self.path / relative, record, verify):
            raise ValueError(
                f"{problem}: restore the file from a copy of the library, or remove its domain with "
                f"`axolotl brainstacks-library {self.path} remove DOMAIN` and train it again"
            )
        return self.path / relative


def _stack_files(domain: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """A PEFT folder's files by name. Raises ValueError for a stack that must not be kept."""
    for key, tensor in tensors.items():
        if key.endswith("brainstacks_B.weight") and not tensor.any():
            raise ValueError(
                f"dead stack: {key} of domain {domain!r} is all zero, so the stack changes nothing "
                "and is not saved: raise its learning_rate or max_steps, or lower null_space.directions"
            )
    return {CONFIG: json_to_bytes(config), WEIGHTS: tensors_to_bytes(tensors, f"the stack of domain {domain!r}")}


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"pid {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its pid is unknown"
