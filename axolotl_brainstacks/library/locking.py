"""A lock that gives a folder one writer: other threads of the process wait, other processes get an error."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from axolotl_brainstacks.guarded import parse_json, printable, read

LOCK = ".lock"
OWNER = ".lock.owner"


class FolderLock:
    """The write lock of a folder, re-entrant within a thread. It ends with its process.

    `of` returns the same object for the same folder, because two `FileLock` objects of one process on one file would refuse
    each other.
    """

    _known: ClassVar[WeakValueDictionary[Path, FolderLock]] = WeakValueDictionary()
    _knowing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self.path, self.owner = folder / LOCK, folder / OWNER
        self._start_free()

    def _start_free(self) -> None:
        self._threads = threading.RLock()
        self._between_processes = FileLock(self.path, timeout=0, thread_local=False)
        self._thread: int | None = None
        self._depth = 0

    @classmethod
    def of(cls, folder: Path) -> FolderLock:
        """The lock of this folder, one object for all paths that lead to it."""
        folder = folder.resolve()
        with cls._knowing:
            return cls._known.get(folder) or cls._known.setdefault(folder, cls(folder))

    @property
    def held(self) -> bool:
        """Whether this thread holds the lock; a forked process does not."""
        return self._thread == threading.get_ident() and self._between_processes.is_locked

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock while the block runs. Raises ValueError if another process holds it."""
        with self._threads:
            outer = self._depth
            # Acquired inside `try`, so that an interrupt right after it leaves nothing locked.
            try:
                if not self._between_processes.is_locked:
                    self._acquire()
                self._thread, self._depth = threading.get_ident(), outer + 1
                yield
            finally:
                self._depth = outer
                if not outer:
                    self._thread = None
                    self._release()

    def _acquire(self) -> None:
        for path in (self.path, self.owner):
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise ValueError(f"{path} is no regular file, and a writer would write through it: delete it")
        try:
            self._between_processes.acquire()
        except Timeout:
            title, alive = self._holder()
            stale = f"; if there is none, as beside a copied {LOCK}, delete {self.path}"
            raise ValueError(
                f"{self.path.parent} is being written by another process ({title}): wait until it has ended, or stop it, "
                f"then run the same command again{'' if alive else stale}"
            ) from None
        # The owner's file only tells a refused process whom to wait for. Failing to write it is no error: a full disk must
        # not stop a writer that frees space.
        with suppress(OSError):
            self.owner.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self.owner, flags, 0o644), "w") as file:
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)

    def _release(self) -> None:
        # The owner's file goes, or a copy of the folder would publish the host's name. A forked process does not hold the
        # lock, so it must not remove the file of its parent.
        try:
            with suppress(OSError, ValueError):
                if self._between_processes.is_locked and self._owner()[0] == os.getpid():
                    self.owner.unlink()
        finally:
            self._between_processes.release(force=True)

    def _owner(self) -> tuple[int, str]:
        found = parse_json(read(self.owner, 4096))
        if not (isinstance(found, dict) and type(found.get("pid")) is int and isinstance(found.get("host"), str)):
            raise ValueError(f"{self.owner} names no process")
        return found["pid"], found["host"]

    def _holder(self) -> tuple[str, bool]:
        """A description of the process that holds the lock, and whether it may be alive."""
        try:
            pid, host = self._owner()
        except (OSError, ValueError):
            return "its pid is unknown", False
        alive = True
        if host == socket.gethostname():
            try:
                os.kill(pid, 0)
            except PermissionError:
                pass
            except (OSError, OverflowError):
                alive = False
        return f"pid {pid} on {printable(host)}", alive


def _start_free_in_child() -> None:
    """In a forked process: it holds no lock of its parent, whose other threads may have been in the middle of taking one."""
    FolderLock._knowing = threading.Lock()
    for lock in list(FolderLock._known.values()):
        lock._start_free()


os.register_at_fork(after_in_child=_start_free_in_child)
