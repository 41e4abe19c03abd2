"""Runs what `axolotl train` and `brainstacks-router` run, each time in fresh processes, without importing each time.

A fork server imports Axolotl once; every process of a run is a fork of it, and can be killed. What a run prints is
appended to one log file. Training runs with `--debug` unless a test looks at what a user sees without: every metric is
printed then, and an error has its traceback.
"""

import multiprocessing
import os
import pty
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import yaml

Command = Literal["train", "router"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["axolotl.cli.train", "axolotl.train", "axolotl.core.builders", "axolotl_brainstacks.curriculum.runner"]
)


def _run(command: Command, config: str, log: str, environment: dict[str, str], debug: bool) -> None:
    os.setsid()  # a process group of its own: `kill_children` ends the data loaders' workers too
    # A child of the fork server would start its data loaders' workers from scratch; Axolotl's own processes fork them.
    multiprocessing.set_start_method("fork", force=True)
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["axolotl"]
    os.environ |= environment
    if "RANK" in environment:
        os.chdir(environment["PWD"])
        from support import launch_cpu  # noqa: F401
    try:
        _call(command, config, debug)
    except Exception as error:  # multiprocessing would print it in its own way
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


def _call(command: Command, config: str, debug: bool) -> None:
    if command == "train":
        from axolotl.cli.train import do_cli

        do_cli(config, debug=debug)
    else:
        from axolotl_brainstacks.router_training.command import run

        run(config)


def kill_children() -> None:
    """Kill the processes that `multiprocessing` started here and that still run, with the process groups they lead."""
    for process in multiprocessing.active_children():
        if (pid := process.pid) is None:
            continue
        with suppress(ProcessLookupError):
            kill = os.killpg if os.getpgid(pid) == pid else os.kill
            kill(pid, signal.SIGKILL)
        process.join()


def write_config(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _start(
    command: Command,
    config: dict[str, Any],
    folder: Path,
    environments: Sequence[dict[str, str]],
    debug: bool,
    terminal: str | None = None,
) -> list[ForkServerProcess]:
    path = write_config(config, folder)
    processes = [
        _CONTEXT.Process(
            target=_run, args=(command, str(path), terminal or str(folder / "train.log"), environment, debug)
        )
        for environment in environments
    ]
    for process in processes:
        process.start()
    return processes


def start_train(
    config: dict[str, Any], folder: Path, command: Command = "train", debug: bool = True
) -> ForkServerProcess:
    """Start training `config` in one process; what it prints is appended to `folder/train.log`."""
    return _start(command, config, folder, [{}], debug)[0]


def train_on_terminal(config: dict[str, Any], folder: Path, environment: dict[str, str]) -> str:
    """Train in one process with a pseudo-terminal for stdout and stderr; what the process has written to it."""
    master, terminal = pty.openpty()
    written = []
    (process,) = _start("train", config, folder, [environment], False, os.ttyname(terminal))
    while process.is_alive() or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.2)[0]:
            written.append(os.read(master, 65536))
    os.close(master)
    os.close(terminal)
    output = b"".join(written).decode()
    assert process.exitcode == 0, output[-6000:]
    return output


def start_ranks(
    config: dict[str, Any],
    folder: Path,
    nodes: Sequence[Path] = (),
    command: Command = "train",
    debug: bool = True,
) -> list[ForkServerProcess]:
    """`start_train` with two processes, as a launcher starts them.

    Args:
        nodes: two working folders; each process is then the only one of a node, and works there.
    """
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1" if nodes else "2", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if "deepspeed" in config:
        shared["DS_ACCELERATOR"] = "cpu"
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": "0" if nodes else str(rank), "PWD": str(nodes[rank] if nodes else folder)}
        for rank in range(2)
    ]
    return _start(command, config, folder, [shared | rank for rank in ranks], debug)


def wait_for(processes: Sequence[ForkServerProcess], folder: Path, text: str) -> Path:
    """Wait until `text` is in the log, which is returned; fails if a process ends before."""
    log = folder / "train.log"
    while not (log.exists() and text in log.read_text()):
        assert all(process.is_alive() for process in processes), log.read_text()[-6000:]
        time.sleep(0.05)
    return log


def kill_once_there(processes: Sequence[ForkServerProcess], file: Path) -> None:
    """Kill all processes (SIGKILL) once `file` exists; fails if one ends before."""
    while not file.exists():
        assert all(process.is_alive() for process in processes), f"a process ended before {file} was there"
        time.sleep(0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(processes: Sequence[ForkServerProcess], folder: Path, expect: int = 0, timeout: float = 600) -> str:
    """Wait for all to end and return the log; fails unless every exit status is `expect`."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    log = (folder / "train.log").read_text()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    statuses = [process.exitcode for process in processes]
    assert statuses == [expect] * len(processes), f"exit statuses {statuses}\n{log[-6000:]}"
    return log


def train(config: dict[str, Any], folder: Path, expect: int = 0, timeout: float = 600, debug: bool = True) -> str:
    """Train to the end in one process and return the log; fails unless the exit status is `expect`."""
    return finish([start_train(config, folder, debug=debug)], folder, expect, timeout)


def train_ranks(
    config: dict[str, Any], folder: Path, nodes: Sequence[Path] = (), expect: int = 0, debug: bool = True
) -> str:
    """Train to the end with two processes and return the log; fails unless both exit statuses are `expect`."""
    return finish(start_ranks(config, folder, nodes, debug=debug), folder, expect)
