"""Files of a library that no answer depends on but later commands read: the prompts and losses that the router was fitted
on, its evaluation, and the report. The manifest lists each with its SHA-256, which is checked before the file is used."""

import logging
from contextlib import suppress
from pathlib import Path, PurePosixPath

from axolotl_brainstacks.guarded import read
from axolotl_brainstacks.library.entries import FileRecord
from axolotl_brainstacks.library.folder import LibraryFolder
from axolotl_brainstacks.library.storage import first_free, read_checked, record_of
from axolotl_brainstacks.names import ROUTER_FILES

LOG = logging.getLogger(__name__)

FORGETTING = "report/forgetting.json"
SAMPLES = "report/samples.jsonl"
ROUTER_CHART = "report/router.png"


class LibraryRecords(LibraryFolder):
    """A library's folder with these files. Every method that changes it asserts that it runs inside `writing()`."""

    def unlisted(self) -> list[str]:
        """The files of the report that the next writer lists, in a library of an earlier version, which listed none.

        A link could lead to any file of this machine, so it is none of them.
        """
        if "records" in self.manifest.model_fields_set:
            return []
        paths = {file: self.path / file for file in (FORGETTING, SAMPLES, ROUTER_CHART)}
        return [file for file, path in paths.items() if path.is_file() and not path.is_symlink()]

    def _tidy(self) -> None:
        super()._tidy()
        found = {}
        for file in self.unlisted():
            try:
                found[file] = record_of(read(self.path / file))
            except (OSError, ValueError) as error:
                LOG.warning("%s: left out of the report", error)
        if found:
            with self._changing() as manifest:
                manifest.records = found

    def write_file(self, relative: str, data: bytes) -> FileRecord:
        """Write a file of the report or the router atomically, and list it in `Manifest.records`.

        The files that a router answers from are an exception: `set_router` lists them. If the present router lists the file,
        it is dropped first, so that a kill before `set_router` leaves a library without a router, not with a damaged one.

        Args:
            relative: path below `report/` or `router/`, relative to the library.
        """
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
            if relative in manifest.records:  # after a kill, the file may match the old record or this one
                manifest.pending[relative] = record
        with self._changing() as manifest:
            manifest.records[relative] = self._put(relative, data)
            manifest.pending.pop(relative, None)
        return record

    def read_file(self, relative: str) -> bytes | None:
        """The content of a file of `Manifest.records`; None if it is not listed.

        Raises:
            ValueError: if a listed file is missing or altered.
        """
        self._check_way(relative)
        path, record = self.path / relative, self.manifest.records.get(relative)
        if record is None:
            return None
        pending = self.manifest.pending.get(relative)
        if pending and not self._problem(relative, pending, pending=False):
            record = pending
        return read_checked(path, record)

    def drop_file(self, relative: str) -> None:
        """Remove a file if `Manifest.records` lists it."""
        if relative not in self.manifest.records:
            return
        with self._changing() as manifest:
            manifest.records.pop(relative)
            manifest.pending.pop(relative, None)
        self._check_way(relative)
        (self.path / relative).unlink(missing_ok=True)

    def set_aside(self, relative: str) -> Path:
        """Rename a file of `Manifest.records` that cannot be read to `<name>.broken`, or `<name>.2.broken` if that is taken;
        unlist it, and return its new path."""
        with self._changing() as manifest:
            manifest.records.pop(relative, None)
            manifest.pending.pop(relative, None)
        path = self.path / relative
        aside = first_free(lambda n: path.with_name(f"{path.name}{f'.{n}' if n > 1 else ''}.broken"))
        with suppress(FileNotFoundError):
            path.replace(aside)
        return aside
