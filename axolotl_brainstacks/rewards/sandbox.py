"""Runs a program that a model wrote in a confined process, and finds out whether it passes its tests."""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

UNISOLATED = "BRAINSTACKS_ALLOW_UNISOLATED_CODE"
_CHILD = Path(__file__).with_name("sandboxed.py")


@dataclass(frozen=True)
class Limits:
    """What one program may use, in seconds and bytes. `disk_bytes` bounds all of its files together."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20


@dataclass(frozen=True)
class Tests:
    """Compiled tests. They take the name `keep` from the program even if Python has a built-in of that name."""

    code: CodeType
    keep: str | None = None


def passes(program: str, tests: Tests, limits: Limits = Limits()) -> bool:
    """Whether `program`, and then `tests` in its namespace, run in time without an exception and with at least one assert."""
    nonce = secrets.token_bytes(16)
    return _verdict(program, tests, nonce, limits) == nonce


def require_isolation() -> None:
    """Raises RuntimeError if this machine cannot isolate programs from network and files, and the user has not allowed that."""
    if not _unisolated_allowed() and (reason := _isolation_failure()):
        raise RuntimeError(
            f"`python_tests` runs code that the model wrote, and this machine does not permit isolating it from the network and "
            f"from files ({reason}): allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 and "
            f"kernel.apparmor_restrict_unprivileged_userns=0; for Docker --security-opt seccomp=unconfined --security-opt "
            f"apparmor=unconfined), or, where the whole machine is a sandbox already, set {UNISOLATED}=1"
        )


@functools.cache
def _isolation_failure() -> str:
    """Why this machine cannot isolate a program; "" if it can."""
    nonce = secrets.token_bytes(16)
    tests = Tests(compile("__counted__(True)", "<tests>", "exec"))
    verdict = _verdict("", tests, nonce, Limits(wall_seconds=60))
    return "" if verdict == nonce else verdict.decode(errors="replace") or "its process ended before it said anything"


def _unisolated_allowed() -> bool:
    return os.environ.get(UNISOLATED) == "1"


def _verdict(program: str, tests: Tests, nonce: bytes, limits: Limits) -> bytes:
    """Run the program in a child process, and return the child's answer.

    The child's input ends with the nonce, and the child reads it only after all tests have passed, so a program cannot pass
    by ending the process early.

    Returns:
        `nonce` if all tests passed; a reason if the program could not be isolated; else any other bytes.
    """
    job = asdict(limits) | {"unisolated": _unisolated_allowed(), "program": program.encode("utf-8", "replace").decode()}
    messages = [marshal.dumps(job), marshal.dumps((tests.code, tests.keep)), nonce]
    # A pipe of its own for the answer: the program's standard output leads nowhere, so printing cannot forge one.
    answer, given = os.pipe()
    with tempfile.TemporaryDirectory(prefix="brainstacks-") as folder, os.fdopen(answer, "rb", buffering=0) as answers:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD), str(given)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[given],
            start_new_session=True,
        )
        os.close(given)
        try:
            process.communicate(b"".join(len(m).to_bytes(4) + m for m in messages), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return b""
        finally:
            # The whole session, because without isolation the program may have started processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # The child is dead, so whatever it wrote is in the pipe. Without isolation a process that it started may still hold the
        # other end open, and a blocking read would wait for it.
        os.set_blocking(answers.fileno(), False)
        return answers.read(1000) or b""
