"""Writers of a library: one at a time, and killed or out of disk at any moment they leave a whole library."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest
import torch
from support.random_library import CONFIG, KEY, a_domain, a_round, new_library, some_tensors
from support.random_library import library as library

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry
from axolotl_brainstacks.library.locking import FolderLock
from axolotl_brainstacks.library.manifest import Manifest


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start in a few milliseconds with torch already imported, and share no lock with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["axolotl_brainstacks.library", "click.testing", "pytest"])
    return context


def hold(path: Path, ready: Connection) -> None:
    with Library.open(path).writing():
        if os.fork() == 0:  # as a data loader's worker: it outlives the writer and must not keep the lock
            ready.send(os.getpid())  # from here, as the lock is let go after the fork, in the worker
        time.sleep(60)


def test_one_writer_at_a_time(library: Library, processes: multiprocessing.context.ForkServerContext) -> None:
    receive, send = processes.Pipe(duplex=False)
    writer = processes.Process(target=hold, args=(library.path, send))
    writer.start()
    assert receive.poll(60)
    worker = receive.recv()
    try:
        with pytest.raises(ValueError, match=rf"another process \(pid {writer.pid} on .*\): wait"), library.writing():
            pass
        assert Library.open(library.path).verify() == [], "readers need no lock"
        writer.kill()
        writer.join()
        with library.writing():
            library.add_domain(a_domain("law"))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_two_libraries_of_one_process_are_one_writer(library: Library) -> None:
    other = Library.open(library.path)
    with library.writing():
        with other.writing():
            other.add_domain(a_domain("law"))
        library.add_domain(a_domain("math"))
    assert [d.name for d in Library.open(library.path).manifest.domains] == ["chat", "code", "law", "math"]
    with pytest.raises(AssertionError):
        other.add_domain(a_domain("medical"))


def test_a_forked_process_can_use_the_library_that_its_parent_had_open(library: Library) -> None:
    """multiprocessing's default on Python 3.12. Another thread of the parent may hold the lock at that moment."""
    writing, forked = threading.Event(), threading.Event()

    def write() -> None:
        with library.writing():
            writing.set()
            forked.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    writing.wait(60)
    receive, send = multiprocessing.Pipe(duplex=False)
    receive_go, send_go = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        try:
            try:
                with library.writing():
                    send.send("wrote beside the parent")
            except ValueError as error:
                send.send(str(error))
            receive_go.recv()
            with library.writing():
                library.add_domain(a_domain("law"))
            send.send("written")
        finally:
            os._exit(0)
    try:
        assert receive.poll(30), "the child hangs"
        assert "another process" in receive.recv()
        forked.set()
        writer.join()
        send_go.send(None)
        assert receive.poll(30) and receive.recv() == "written"
    finally:
        forked.set()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with library.writing():
        library.add_domain(a_domain("math"))


def test_an_interrupt_right_after_the_lock_is_taken_lets_it_go(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FolderLock.of(library.path)
    take = lock._acquire

    def interrupted() -> None:
        take()
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, "_acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), library.writing():
        pass
    assert not lock._between_processes.is_locked


def every_change(library: Library) -> Iterator[None]:
    """Each kind of change once; the manifest depends on nothing random."""
    tensors = {KEY + "B.weight": torch.arange(1.0, 4000.0)}
    yield library.add_domain(a_domain("law", ["s001_chat"]), b"rows of law")
    yield library.record_round("law", a_round(1, kept=False))
    yield library.write_protection("code", {"v": tensors[KEY + "B.weight"].reshape(-1, 3)}, 0.5, 0.5, []) and None
    yield library.add_stack("law", 2, CONFIG, tensors, a_round(2)) and None
    yield library.finish_domain("law") and None
    yield library.replace_domain("law") and None
    yield library.renew_validation("law", 3.5, b"other rows", 1)
    yield library.add_stack("law", 1, CONFIG, tensors, a_round()) and None
    yield library.finish_domain("law") and None
    record = library.write_file("router/router.safetensors", b"new")
    yield
    yield library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["law"]))
    yield library.write_file("report/forgetting.json", b"first") and None
    yield library.write_file("report/forgetting.json", b"second") and None
    yield library.remove_domain("code") and None


def change_and_die(path: Path, moment: int) -> None:
    """Be killed just before the given operation on the library's files; the interpreter announces each one."""
    library = Library.open(path)
    moments = iter(range(moment))

    def count(event: str, args: tuple) -> None:
        changes = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(path) in str(args[0])
        if changes and next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with library.writing():
        for _ in every_change(library):
            pass


def test_a_kill_before_any_file_operation(
    library: Library, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    with library.writing():
        library.write_protection("code", {"v": torch.randn(1000, 2)}, 0.5, 0.5, [])
        record = library.write_file("router/router.safetensors", b"old")
        library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["chat", "code"]))
    shutil.copytree(library.path, tmp_path / "whole")
    states = [library.manifest]
    with (whole := Library.open(tmp_path / "whole")).writing():
        for _ in every_change(whole):
            states.append(whole.manifest)
    seen: list[Manifest] = []
    for moment in range(0, 1000):
        victim = tmp_path / f"killed{moment}"
        shutil.copytree(library.path, victim)
        process = processes.Process(target=change_and_die, args=(victim, moment))
        process.start()
        process.join()
        survivor = Library.open(victim)
        assert all("unknown" in problem for problem in survivor.verify())
        with survivor.writing():
            assert survivor.verify() == [] and not (victim / ".tmp").exists()
        if survivor.manifest not in seen:
            seen.append(survivor.manifest)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert seen == states and moment > 50


def join_and_die(path: Path, other: Path, moment: int) -> None:
    library, moments = Library.open(path), iter(range(moment))

    def count(event: str, args: tuple) -> None:
        changes = event in ("open", "os.rename", "os.mkdir") and str(path) in str(args[0])
        if changes and next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with library.writing():
        library.join(Library.open(other), {"law": "law", "math": "sums"})


def test_a_kill_leaves_nothing_half_joined(
    library: Library, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    other = new_library(tmp_path / "other", "law", "math", base=library.manifest.base)
    with other.writing():
        other.add_stack("law", 2, CONFIG, some_tensors(), a_round(2), ["s001_law"])
        for name in ("law", "math"):
            other.finish_domain(name)
    seen = []
    for moment in range(0, 1000):
        victim = tmp_path / f"killed{moment}"
        shutil.copytree(library.path, victim)
        process = processes.Process(target=join_and_die, args=(victim, other.path, moment))
        process.start()
        process.join()
        survivor = Library.open(victim)
        with survivor.writing():
            assert survivor.verify() == [] and not (victim / ".tmp").exists()
        names = [domain.name for domain in survivor.manifest.domains], [s.name for s in survivor.manifest.stacks]
        if names not in seen:
            seen.append(names)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    stacks = ["s001_chat", "s002_code"]
    joined = ["s003_law", "s004_law", "s005_sums"]
    assert seen == [(["chat", "code"], stacks), (["chat", "code", "law", "sums"], stacks + joined)] and moment > 20


def add_for_ever(path: Path, progress: Semaphore) -> None:
    library = Library.open(path)
    with library.writing():
        while True:
            progress.release()
            library.add_stack("chat", 1, CONFIG, some_tensors(rows=4096), a_round())


def test_kills_at_random_moments(library: Library, processes: multiprocessing.context.ForkServerContext) -> None:
    stacks = [s.name for s in library.manifest.stacks]
    for _ in range(20):
        progress = processes.Semaphore(0)
        process = processes.Process(target=add_for_ever, args=(library.path, progress))
        process.start()
        assert progress.acquire(timeout=60) and progress.acquire(timeout=60), "one stack is in"
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        library = Library.open(library.path)
        with library.writing():
            assert library.verify() == []
        names = [s.name for s in library.manifest.stacks]
        assert names[: len(stacks)] == stacks, "what was there stays"
        stacks = names
    assert len(stacks) >= 22, "every writer got something done"


def test_a_full_disk_leaves_the_old_state(small_disk: Path) -> None:
    library = new_library(small_disk / "library", "chat")
    page = os.sysconf("SC_PAGESIZE")
    ballast = small_disk / "ballast"
    before = library.manifest
    failed_at = set()
    with library.writing():
        for free_pages in range(100):
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - free_pages * page))
            try:
                library.add_stack("chat", 2, CONFIG, some_tensors(rows=2 * page // 64), a_round(2))
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and re.search(r"disk full, \d+ bytes are needed", str(error))
                failed_at.add(Path(error.filename).name)
            assert library.manifest == Library.open(library.path).manifest == before
            assert library.verify() == [] and not (library.path / ".tmp").exists()
    assert failed_at == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert [s.name for s in library.manifest.stacks] == ["s001_chat", "s002_chat"] and library.verify() == []
