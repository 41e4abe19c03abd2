"""Runs what `axolotl train` runs, each time in a fresh process, without paying for the imports each time.

A fork server imports Axolotl once; every run is a fork of it, with its own log file, and can be killed.
"""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["axolotl.cli.train", "axolotl.train", "axolotl.core.builders", "axolotl_brainstacks.curriculum.runner"]
)


def _train(config: str, log: str) -> None:
    # A child of the fork server would start its data loaders' workers from scratch; Axolotl's own processes fork them.
    multiprocessing.set_start_method("fork", force=True)
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["axolotl"]
    from axolotl.cli.train import do_cli

    do_cli(config)


def start_train(config: dict[str, Any], folder: Path) -> ForkServerProcess:
    """Start training `config`; what it prints is appended to `folder/train.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    process = _CONTEXT.Process(target=_train, args=(str(path), str(folder / "train.log")))
    process.start()
    return process


def train(config: dict[str, Any], folder: Path, expect: int = 0, timeout: float = 600) -> str:
    """Train to the end and return the log; fails unless the exit status is `expect`."""
    process = start_train(config, folder)
    process.join(timeout)
    log = (folder / "train.log").read_text()
    if process.is_alive():
        process.kill()
    assert process.exitcode == expect, f"exit status {process.exitcode}\n{log[-6000:]}"
    return log
