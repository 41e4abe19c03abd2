"""Files of a library that later commands read, though no answer comes from them: the prompts and losses that the router was
made from, its evaluation, the report. Each is listed in the manifest with its hash, and checked before it is used."""

from contextlib import suppress
from pathlib import Path, PurePosixPath

from axolotl_brainstacks.guarded import read
from axolotl_brainstacks.library.folder import LibraryFolder
from axolotl_brainstacks.library.manifest import ROUTER_FILES, FileRecord
from axolotl_brainstacks.library.storage import read_checked, record_of


class LibraryRecords(LibraryFolder):
    """The folder with these files; writing asserts that it runs inside `writing()`."""

    def write_file(self, relative: str, data: bytes) -> FileRecord:
        """Write a file of the report or the router, atomically, and list it; those that a router answers from are listed
        by `set_router`. A router that listed the file is dropped first: a kill before `set_router` then leaves a library
        without a router, not a damaged one."""
        assert relative.startswith(("report/", "router/")) and ".." not in PurePosixPath(relative).parts, relative
        record = record_of(data)
        if relative in ROUTER_FILES or relative in self.manifest.router_files:
            with self._changing() as manifest:
                if manifest.router and relative in manifest.router.files:
                    manifest.router = None
            with self._changing():
                return self._put(relative, data)
        if self.manifest.records.get(relative) == record and not self._problem(relative, record):
            return record
        with self._changing() as manifest:
            if relative in manifest.records:  # a kill from here on leaves one of the two
                manifest.pending[relative] = record
        with self._changing() as manifest:
            manifest.records[relative] = self._put(relative, data)
            manifest.pending.pop(relative, None)
        return record

    def read_file(self, relative: str, unlisted: bool = False) -> bytes | None:
        """A file of `Manifest.records`; None when it is not listed.

        With `unlisted` also one that is there without being listed, as in a library of an older version; no link, which
        could lead to any file of this machine. Raises ValueError when the file is missing or altered.
        """
        self._check_way(relative)
        path, record = self.path / relative, self.manifest.records.get(relative)
        if record is None:
            return read(path) if unlisted and path.exists() and not path.is_symlink() else None
        pending = self.manifest.pending.get(relative)
        if pending and not self._problem(relative, pending, pending=False):
            record = pending
        return read_checked(path, record)

    def drop_file(self, relative: str) -> None:
        """Remove a file of `Manifest.records`, if it is one."""
        if relative not in self.manifest.records:
            return
        with self._changing() as manifest:
            manifest.records.pop(relative)
            manifest.pending.pop(relative, None)
        self._check_way(relative)
        (self.path / relative).unlink(missing_ok=True)

    def set_aside(self, relative: str) -> Path:
        """Rename a file of `Manifest.records` that cannot be used, and list it no more. Its new path."""
        with self._changing() as manifest:
            manifest.records.pop(relative, None)
            manifest.pending.pop(relative, None)
        path = self.path / relative
        aside = path.with_name(f"{path.name}.broken")
        with suppress(FileNotFoundError):
            path.replace(aside)
        return aside
