"""The folder of a library: it has one writer at a time, and is consistent even if that writer is killed.

A writer puts every new file into `.tmp`, syncs it and renames it into place. The change takes effect when the new
`manifest.json` replaces the old one. A file that has a name of ours but is not in the manifest was left by a killed
writer, or the manifest is an old copy; the next writer moves such a file into `.leftovers` instead of deleting it.

The folder may come from a stranger, so nothing is read, written or removed through a link to a folder inside it.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Self

from axolotl_brainstacks.guarded import folder_problem, parse_json, printable, read, shortened
from axolotl_brainstacks.library.entries import CONFIG as CONFIG
from axolotl_brainstacks.library.entries import STACK_PATTERN, FileRecord
from axolotl_brainstacks.library.entries import WEIGHTS as WEIGHTS
from axolotl_brainstacks.library.locking import LOCK, OWNER, FolderLock
from axolotl_brainstacks.library.manifest import BaseModelInfo, Manifest
from axolotl_brainstacks.library.storage import (
    first_free,
    json_to_bytes,
    make_writable,
    problem_of,
    read_checked,
    record_of,
    sync_folder,
    write_durably,
)
from axolotl_brainstacks.names import DOMAIN_NAME, MANIFEST, PIN, FrozenDtype

LOG = logging.getLogger(__name__)

STAGING = ".tmp"
LEFTOVERS = ".leftovers"
# Folders in which the manifest lists every file, each with the pattern of the names that this package gives there.
OWNED = {
    "stacks": re.compile(STACK_PATTERN),
    "nullspace": re.compile(rf"{DOMAIN_NAME.pattern}-[0-9a-f]{{12}}\.safetensors"),
    "validation": re.compile(rf"{DOMAIN_NAME.pattern}(-[0-9a-f]{{12}})?\.safetensors"),
}
_FOLDERS = (*OWNED, "router", "router/discovery", "router/prompts", "report", STAGING, LEFTOVERS)


class LibraryFolder:
    """A library's folder, and its manifest as last read or written. Reading needs no lock.

    Attributes:
        sha256: SHA-256 (hex) of `manifest.json` as this object last read or wrote it; empty if it has done neither.
    """

    def __init__(self, path: Path, manifest: Manifest, sha256: str = "") -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        self._lock = FolderLock.of(path)
        self._published: set[str] = set()

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether the folder has a manifest."""
        return (Path(path) / MANIFEST).is_file()

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> Self:
        """Read a library's manifest; the files that it lists are checked only when they are read.

        Args:
            sha256: the SHA-256 (hex) that `manifest.json` has to have, as `list` and `verify` print it. The default is the
                value of the environment variable BRAINSTACKS_LIBRARY_SHA256; if both are missing or empty, any library
                will do.

        Raises:
            ValueError: if the folder is not a library, its manifest has another SHA-256, is damaged or was written by a
                newer version, or one of its folders is a link.
        """
        folder = Path(path).absolute()
        found = record_of(content := Manifest.read_bytes(folder)).sha256
        wanted = os.environ.get(PIN, "") if sha256 is None else sha256
        if wanted and wanted != found:
            raise ValueError(
                f"the library has to have the SHA-256 {printable(wanted)} (brainstacks.library_sha256, {PIN} or `sha256=`), but "
                f"that of {folder / MANIFEST} is {found}: get the library that was pinned, or set the new value if it was you "
                "who changed it"
            )
        _check_folders(folder)
        return cls(folder, Manifest.parse(content, folder / MANIFEST), found)

    @classmethod
    def create(cls, path: str | Path, base: BaseModelInfo, frozen_dtype: FrozenDtype = None) -> Self:
        """Make an empty library. Raises ValueError if the folder is a library already, or as `check_new` does."""
        folder = Path(path).absolute()
        if not cls.exists(folder):
            cls.check_new(folder)
        library = cls(folder, Manifest(base=base, frozen_dtype=frozen_dtype))
        with library._lock.hold():
            if cls.exists(folder):
                raise ValueError(f"{folder} is a library already: open it, or name a new folder in brainstacks.library")
            library._remove(STAGING)
            library._commit(library.manifest)
            library._remove(STAGING)
            library._read_again()
        return library

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Make the folder for a new library if it does not exist.

        Raises:
            ValueError: if the folder cannot be made or written, or is not empty, or the environment variable pins a library.
        """
        folder = Path(path).absolute()
        LibraryFolder.check_unpinned(folder)
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
        _check_folders(folder)

    @staticmethod
    def check_unpinned(path: str | Path) -> None:
        """Raises ValueError, as there is no library in this folder, if the environment variable pins the one to use."""
        if os.environ.get(PIN):
            raise ValueError(
                f"{PIN} is set, but {path} is not a library (no {MANIFEST}): get the library that was pinned, or unset {PIN} "
                "to make a new one"
            )

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Self]:
        """Hold the library's write lock; re-entrant within a thread. The lock ends with its process.

        Entering reads the manifest again and moves the leftovers of killed writers aside. Other threads of this process
        wait for the lock.

        Raises:
            ValueError: if another process holds the lock, or a folder of the library is a link.
        """
        with self._lock.hold():
            _check_folders(self.path)
            self._tidy()
            yield self

    def verify(self) -> list[str]:
        """Check every file that the manifest lists, and look for files with our names that it does not list.

        Returns:
            One line per problem, with its remedy; empty if every file that can change an answer, a training run or the
            report is as the manifest says.
        """
        files = self.manifest.files
        unknown = [
            f"{shortened(path)} is unknown to {MANIFEST}: move it out of the library"
            for folder in OWNED
            for path in sorted((self.path / folder).rglob("*"))
            if path.name == CONFIG or path.suffix == ".safetensors"
            if path.relative_to(self.path).as_posix() not in files
        ]
        router = [
            f"{problem}: fit the router again with `axolotl brainstacks-router CONFIG`"
            for problem in self._problems(self.manifest.router_files)
        ]
        reading = [
            f"{problem}: `axolotl brainstacks-router CONFIG` measures it again"
            if file.startswith("router/")
            else f"{problem}: draw it again with `axolotl brainstacks-library {self.path} report`"
            for file, record in self.manifest.records.items()
            if (problem := self._problem(file, record))
        ]
        return self.damage() + router + unknown + self._root_problems() + reading

    def not_covered(self) -> list[str]:
        """Files in the library's folder that no command reads and `verify` does not check; `.leftovers` is left out."""
        ours = {*self.manifest.covered, MANIFEST, LOCK, OWNER}
        return [file for file in self._present() if file not in ours and not file.startswith(f"{LEFTOVERS}/")]

    def leftovers(self) -> list[Path]:
        """Files and folders that a writer moved aside because the manifest does not list them; the user deletes them."""
        folder = self.path / LEFTOVERS
        return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []

    def damage(self) -> list[str]:
        """The problems that stop a training run: those of stacks, null-space columns and validation examples.

        Training writes the root's files again, does not read the router and leaves unlisted files alone, so those problems
        are left to `verify`.

        Returns:
            One line per problem, with its remedy.
        """
        owner = {f"stacks/{stack.name}/{file}": stack.domain for stack in self.manifest.stacks for file in stack.files}
        owner |= {file: domain.name for domain in self.manifest.domains for file in domain.files}
        files = self.manifest.files
        return [
            f"{problem}: {self._fix(f'domain `{domain}`', domain)}"
            for file, domain in owner.items()
            if (problem := self._problem(file, files[file]))
        ]

    def _root_problems(self) -> list[str]:
        """Problems of the two files that PEFT reads when it loads the whole library as one adapter."""
        fix = "run `axolotl train` on its YAML again, which writes it anew"
        if problems := self._problems(self.manifest.root):
            return [f"{problem}: {fix}" for problem in problems]
        found = [file for file in (CONFIG, WEIGHTS) if (self.path / file).exists() and file not in self.manifest.root]
        if found:
            return [f"{printable(self.path / file)} is unknown to {MANIFEST}: {fix}" for file in found]
        if CONFIG in self.manifest.root:
            try:
                named = parse_json(read(self.path / CONFIG))["library"]
            except (OSError, ValueError, KeyError, TypeError):
                named = None
            if named != ".":
                return [f"{printable(self.path / CONFIG)} names the library {named!r} instead of '.': {fix}"]
        return []

    def _problem(self, file: str, record: FileRecord, verify: bool = True, pending: bool = True) -> str | None:
        """What is wrong with `file`, or None; its content is read only with `verify`.

        A file that the manifest also lists as `pending` may have either content: a killed writer leaves the old or the new.
        """
        if problem := folder_problem(self.path, file) or problem_of(self.path / file, record, verify):
            other = self.manifest.pending.get(file) if pending else None
            return problem if other is None or self._problem(file, other, verify, pending=False) else None
        return None

    def _problems(self, files: dict[str, FileRecord]) -> list[str]:
        return [problem for file, record in files.items() if (problem := self._problem(file, record))]

    def _present(self) -> Iterator[str]:
        """Path of every file relative to the library; a link to a folder counts as a file."""
        for folder, inner, files in os.walk(self.path):
            inner.sort()
            for name in sorted([*files, *(name for name in inner if (Path(folder) / name).is_symlink())]):
                yield (Path(folder) / name).relative_to(self.path).as_posix()

    # The machinery of a change

    @contextmanager
    def _changing(self) -> Iterator[Manifest]:
        """Yield the manifest on disk for the caller to change, and commit it if the block ends without an error.

        The order makes a kill harmless at any point. The block publishes new files, which no manifest lists yet; then the
        new manifest replaces the old one in a single rename; and only after that the files that it no longer lists are
        removed. If the block raises, the files that it published are removed instead.
        """
        assert self._lock.held, "the library is changed outside `with library.writing()`"
        before = Manifest.read(self.path)
        manifest = before.model_copy(deep=True)
        self._published.clear()
        try:
            yield manifest
            if manifest != before:
                self._commit(Manifest.model_validate(manifest.model_dump()))
        finally:
            self._read_again()
            for gone in (_owned(before) | self._published) - _owned(self.manifest):
                self._remove(gone, set(before.files) if gone in _owned(before) else None)
            self._remove(STAGING)

    def _commit(self, manifest: Manifest) -> None:
        data = json_to_bytes(json.loads(manifest.model_dump_json()))
        try:
            Manifest.check_size(data)
        except ValueError as error:
            raise ValueError(
                f"{self.path / MANIFEST} would be too large to be read again ({error}): train into a new library"
            ) from error
        self._put(MANIFEST, data)

    def _put(self, relative: str, data: bytes) -> FileRecord:
        staged = self.path / STAGING / PurePosixPath(relative).name
        record = write_durably(staged, data)
        self._publish(staged, relative)
        return record

    def _publish(self, staged: Path, relative: str) -> None:
        """Rename a staged file or folder to its place in the library, durably."""
        self._check_way(relative)
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        top = PurePosixPath(relative).parts[0]
        if os.path.lexists(target):
            unlisted = (
                top in (*OWNED, "report") and relative not in _owned(self.manifest) | self.manifest.records.keys()
            )
            in_the_way = _is_folder(target) and not staged.is_dir()
            if unlisted or in_the_way:
                self._move_aside(target)
        if top in OWNED:
            self._published.add(relative)
        staged.replace(target)
        # A rename survives a power cut only when the folder is synced, as is each folder above it that may be new.
        for folder in PurePosixPath(relative).parents:
            sync_folder(self.path / folder)

    def _tidy(self) -> None:
        """Read the manifest again, and move aside each file that has a name of ours and is not listed."""
        self._read_again()
        self._remove(STAGING)
        listed = _owned(self.manifest)
        found = (p for folder, name in OWNED.items() for p in (self.path / folder).glob("*") if name.fullmatch(p.name))
        unlisted = [path for path in found if path.relative_to(self.path).as_posix() not in listed]
        # A killed writer leaves at most the stack `next_stack`. A higher number was given by a newer manifest, and moving
        # its stacks aside would take a finished domain's files away.
        numbers = {p: int(p.name[1:].partition("_")[0]) for p in unlisted if p.parent.name == "stacks"}
        if newer := [p for p, number in numbers.items() if number > self.manifest.next_stack]:
            raise ValueError(
                f"{self.path / MANIFEST} is older than {min(newer)}: put the newest {MANIFEST} back, or move the stacks that "
                "it does not know out of the library"
            )
        for path in unlisted:
            self._move_aside(path)
        if pending := self.manifest.pending:
            whole = {file: r for file, r in pending.items() if not self._problem(file, r, pending=False)}
            with self._changing() as manifest:
                manifest.records |= whole
                manifest.pending = {}

    def _move_aside(self, path: Path) -> None:
        """Move an unlisted file or folder into `.leftovers`: a killed run, the user or a newer manifest may own it."""
        now = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        (self.path / LEFTOVERS).mkdir(exist_ok=True)
        folder = self.path / LEFTOVERS
        target = first_free(lambda number: folder / f"{now}-{f'{number}-' if number > 1 else ''}{path.name}")
        if _is_folder(path):
            _allow_changes(path)
        path.rename(target)
        LOG.warning(
            "%s is not listed in %s: a killed run left it, or the manifest is an old one, or it is yours; it is now %s: "
            "delete that when nothing is missing",
            path,
            MANIFEST,
            target,
        )

    def _remove(self, relative: str, listed: Container[str] | None = None) -> None:
        """Remove the file, folder or link at this path; a link's target stays.

        What this package never writes into such a folder moves to `.leftovers`: files that are not in `listed`, if that is
        given, and folders, except those of stacks in the staging folder.
        """
        self._check_way(relative)
        path = self.path / relative
        if not _is_folder(path):
            with suppress(FileNotFoundError):
                path.unlink()
            return
        _allow_changes(path)
        for entry in sorted(path.iterdir()):
            inner = f"{relative}/{entry.name}"
            if (_is_folder(entry) and relative != STAGING) or (listed is not None and inner not in listed):
                self._move_aside(entry)
            else:
                self._remove(inner)
        path.rmdir()

    def _read_again(self) -> None:
        content = Manifest.read_bytes(self.path)
        self.manifest, self.sha256 = Manifest.parse(content, self.path / MANIFEST), record_of(content).sha256

    def _check_way(self, relative: str) -> None:
        """Raises ValueError if a folder between the library and its file `relative` is a link."""
        if problem := folder_problem(self.path, relative):
            raise ValueError(problem)

    def _checked(self, relative: str, record: FileRecord, verify: bool = True) -> Path:
        """The path of a file that is as `record` says. Raises ValueError with the remedy if it is not."""
        if problem := self._problem(relative, record, verify):
            raise ValueError(f"{problem}: {self.fix}")
        return self.path / relative

    def _content(self, relative: str, record: FileRecord) -> bytes:
        """The content of a file that is as `record` says. Raises ValueError with the remedy if it is not."""
        self._checked(relative, record, verify=False)
        try:
            return read_checked(self.path / relative, record)
        except ValueError as error:
            raise ValueError(f"{error}: {self.fix}") from error

    @property
    def fix(self) -> str:
        """The remedy for a damaged file of a domain, as the end of an error."""
        return self._fix("its domain", "DOMAIN")

    def _fix(self, owner: str, name: str) -> str:
        return (
            f"restore the file from a copy of the library, or remove {owner} with "
            f"`axolotl brainstacks-library {self.path} remove {name}` and train it again"
        )


def _is_folder(path: Path) -> bool:
    """Whether this is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _allow_changes(folder: Path) -> None:
    """Let this user change a folder's content, as archives keep the modes of folders that were read-only elsewhere."""
    with suppress(PermissionError):  # of another user: what comes next says which path cannot be changed
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def _owned(manifest: Manifest) -> set[str]:
    """What the manifest lists in the `OWNED` folders, as relative paths: folders of stacks, and other files."""
    parts = (PurePosixPath(file).parts for file in manifest.files)
    return {"/".join(path[:2]) for path in parts if path[0] in OWNED}


def _check_folders(folder: Path) -> None:
    for relative in _FOLDERS:
        if problem := folder_problem(folder, f"{relative}/file"):
            raise ValueError(problem)
