"""The folder of a library: one writer at a time, whole at every moment.

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
from typing import Self

from filelock import FileLock, Timeout

from axolotl_brainstacks.args import FrozenDtype
from axolotl_brainstacks.manifest import MANIFEST, STACK_PATTERN, BaseModelInfo, FileRecord, Manifest
from axolotl_brainstacks.storage import json_to_bytes, make_writable, problem_of, sync_folder, write_durably

LOG = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STAGE = ".tmp"
# Folders in which every file is listed in the manifest, and what we call what we put there.
OWNED = {
    "stacks": re.compile(STACK_PATTERN),
    "nullspace": re.compile(r"[a-z][a-z0-9_]{0,31}-[0-9a-f]{12}\.safetensors"),
    "validation": re.compile(r"[a-z][a-z0-9_]{0,31}(-[0-9a-f]{12})?\.safetensors"),
}


class LibraryFolder:
    """A library's folder and its manifest, as last read or written. Reading needs no lock."""

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
            self._sweep(after_a_change=True)

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

    def _sweep(self, after_a_change: bool = False) -> None:
        """Read the manifest again and remove what is ours by its name, and not listed.

        A killed writer left it; unless `after_a_change`, which removed it or failed.
        """
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
        for path in () if after_a_change else numbers:
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


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"pid {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its pid is unknown"
