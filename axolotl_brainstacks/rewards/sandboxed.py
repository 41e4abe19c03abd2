"""The script that `axolotl_brainstacks.rewards.sandbox` starts: it confines its own process, then runs a program in it.

It imports only the standard library, because it starts without this package. A confined program has no environment, its
standard input and output lead nowhere, and within the limits of its job it has

- no network: it has its own network and user namespaces, and cannot make sockets;
- no files to write except in its folder, a small file system in memory: all others are read-only;
- no other processes: it cannot start, signal or inspect one. It may start threads.

It can read what its user may read, but it can pass on only one bit: whether the tests pass.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import marshal
import os
import platform
import resource
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
# The functions below use this copy, so a program that changes the module `builtins` does not affect them.
__builtins__ = dict(vars(builtins))  # type: ignore[assignment]


def main(answer: int) -> None:
    """Read the job from standard input, confine this process, and run the job.

    Args:
        answer: file descriptor that the answer is written to.
    """
    job_input, nowhere = os.dup(0), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    job = marshal.loads(_receive(job_input))
    _limit(job)
    for confine in (lambda: _own_namespaces(job["disk_bytes"]), _forbid_system_calls):
        try:
            confine()
        except OSError as error:
            if not job["unisolated"]:
                os.write(answer, str(error).encode())
                os._exit(1)
    _judge(job["program"], job_input, answer)


def _receive(source: int) -> bytes:
    """Read the next message, four bytes of length and then its bytes, and nothing after it."""

    def exactly(count: int) -> bytes:
        read = b""
        while len(read) < count and (part := os.read(source, count - len(read))):
            read += part
        return read

    return exactly(int.from_bytes(exactly(4)))


def _judge(program: str, job_input: int, answer: int) -> None:
    """Run the program, then its tests, then write the nonce. Tests and nonce are still unread while the program runs."""
    # Local names, because the program may replace functions in modules.
    receive, load, write, leave, run, make = _receive, marshal.loads, os.write, os._exit, exec, compile
    pristine, same, counted = dict(vars(builtins)), _same, 0

    def count(value: Any) -> bool:
        nonlocal counted
        counted += 1
        return bool(value)

    module = sys.modules["completion"] = types.ModuleType("completion")  # dataclasses and others look for it
    names = vars(module)
    try:
        run(make(program, "<completion>", "exec"), names)
        tests, keep = load(receive(job_input))
        # The program's names do not hide Python's own from the tests: with `def abs(x): return 0` many tests would pass.
        seen = {name: value for name, value in names.items() if name not in pristine or name == keep}
        run(tests, seen | {"__builtins__": pristine, "__name__": "tests", "__same__": same, "__counted__": count})
        if counted:
            write(answer, receive(job_input))
    finally:
        leave(0)


def _same(left: Any, right: Any) -> bool:
    """Whether left == right, without trusting an `__eq__` of the program that returns True for anything.

    Two objects of the same class of the program may be compared by its `__eq__`, because a task can ask for such a class.
    """
    return bool(left == right) and _comparable(left, right)


def _comparable(left: Any, right: Any) -> bool:
    """Whether two equal objects are equal by Python's own types, or by one and the same class of the program."""
    if type(left) is not type(right):
        return _honest(left) and _honest(right)
    if isinstance(left, list | tuple):
        return all(map(_comparable, left, right))
    if isinstance(left, dict):
        return _honest(list(left)) and all(_comparable(left[key], right[key]) for key in left)
    return not isinstance(left, set | frozenset) or _honest(left)


def _honest(value: Any) -> bool:
    """Whether no object in `value` has an `__eq__` that the program defined."""
    if isinstance(value, dict):
        return _honest(list(value)) and _honest(list(value.values()))
    own = any("__eq__" in vars(kind) and _of_program(kind) for kind in type(value).__mro__)
    return not own and (not isinstance(value, list | tuple | set | frozenset) or all(map(_honest, value)))


def _of_program(kind: type) -> bool:
    """Whether the program defined a class. Python's own are built in, or are found under their name in another module."""
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    made_at_run_time = 1 << 9
    return bool(kind.__flags__ & made_at_run_time) and (kind.__module__ == "completion" or found is not kind)


def _limit(job: dict[str, Any]) -> None:
    """Set the kernel's limits on this process; they cannot be raised again."""
    for kind, limit in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, job["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _call(function: Callable[..., int], name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError with its name if it fails."""
    if function(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def _own_namespaces(disk_bytes: int) -> None:
    """Enter new user, network, IPC and mount namespaces, in which only the working directory, empty, can be written."""
    user, group, folder = os.geteuid(), os.getegid(), os.fsencode(Path.cwd())
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWNS)
    except OSError as error:
        raise OSError(error.errno, f"unshare: {error.strerror}") from None
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", file).write_text(text)
    private, read_only, at_cwd, recursive, mount_setattr = 1 << 18, 1, -100, 0x8000, 442
    attributes = _MountAttributes(set=read_only, propagation=private)
    size = ctypes.sizeof(attributes)
    _call(_libc.syscall, "mount_setattr", mount_setattr, at_cwd, b"/", recursive, ctypes.byref(attributes), size)
    _call(_libc.mount, "mount", b"tmpfs", folder, b"tmpfs", 0, b"size=%d,mode=700" % disk_bytes)
    os.chdir(folder)
    # In its own user namespace the process has all capabilities, and could mount the files writable again. It drops them.
    version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(_libc.capset, "capset", version_3, nothing)


# Threads need `clone`. A filter cannot read the flags of `clone3`, so `clone3` appears to be missing, and C libraries then
# use `clone`.
_COMMON = {"clone3": 435, "io_uring_setup": 425, "pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438}
_X86_64 = _COMMON | {
    **{"socket": 41, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200},
    **{"tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310},
    **{"process_vm_writev": 311, "prlimit64": 302, "setpriority": 141, "sched_setaffinity": 203, "unshare": 272},
    **{"setns": 308, "memfd_create": 319, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248},
    **{"request_key": 249, "keyctl": 250},
}
_AARCH64 = _COMMON | {
    **{"socket": 198, "clone": 220, "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131},
    **{"rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "ptrace": 117, "process_vm_readv": 270},
    **{"process_vm_writev": 271, "prlimit64": 261, "setpriority": 140, "sched_setaffinity": 122, "unshare": 97},
    **{"setns": 268, "memfd_create": 279, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217},
    **{"request_key": 218, "keyctl": 219},
}
# By machine: its number in seccomp data (AUDIT_ARCH), and the numbers of the system calls that are refused.
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def _forbid_system_calls() -> None:
    """Install a seccomp filter that refuses new processes, sockets, signals, and system calls that could evade it.

    It refuses Unix sockets too, because the network namespace does not cover those in the file system.
    """
    machine = platform.machine()
    if machine not in _MACHINES or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    audit, numbers = _MACHINES[machine]
    load, equal, at_least, any_bit, verdict = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16  # offsets in seccomp_data
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    thread = 0x10000
    # An instruction of classic BPF: code, instructions to skip if true, instructions to skip if false, operand.
    filters = [(load, 0, 0, architecture), (equal, 1, 0, audit), (verdict, 0, 0, kill), (load, 0, 0, number)]
    if machine == "x86_64":  # the x32 ABI offers all system calls again, under numbers that the list below lacks
        filters += [(at_least, 0, 1, 0x40000000), (verdict, 0, 0, refuse)]
    for name, call in numbers.items():
        if name != "clone":
            filters += [(equal, 0, 1, call), (verdict, 0, 0, absent if name == "clone3" else refuse)]
    filters += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, first_argument), (any_bit, 1, 0, thread)]
    filters += [(verdict, 0, 0, refuse), (verdict, 0, 0, allow)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in filters))
    program = ctypes.create_string_buffer(struct.pack("HP", len(filters), ctypes.addressof(packed)))
    no_new_privileges, set_seccomp, filter_mode, none = 38, 22, ctypes.c_ulong(2), ctypes.c_ulong(0)
    _call(_libc.prctl, "prctl", no_new_privileges, ctypes.c_ulong(1), none, none, none)
    _call(_libc.prctl, "seccomp", set_seccomp, filter_mode, ctypes.byref(program), none, none)


if __name__ == "__main__":
    with contextlib.suppress(BaseException):
        main(int(sys.argv[1]))
    os._exit(0)
