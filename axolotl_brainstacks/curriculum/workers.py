"""Data loaders' worker processes outlive the signals that ask training to stop, so that its last step has its batch.

A cluster's scheduler, `timeout` and Ctrl-C signal the whole process group, workers included.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

WorkerInit = Callable[[int], Any]


def keep_workers(trainer: Trainer) -> None:
    """Let the workers of all data loaders that `trainer` makes from now on ignore SIGINT, and SIGTERM except its own."""
    for name in ("get_train_dataloader", "get_eval_dataloader"):
        setattr(trainer, name, _with_kept_workers(getattr(trainer, name)))


def _with_kept_workers(make: Callable[..., DataLoader[Any]]) -> Callable[..., DataLoader[Any]]:
    def made(*args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = make(*args, **kwargs)
        # Accelerate's loaders have one inside, which starts the workers.
        own = getattr(loader, "base_dataloader", loader)
        own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
        return loader

    return made


def _start_worker(then: WorkerInit | None, worker: int) -> None:
    """The `worker_init_fn`: it runs in the main thread of a new worker, and `then` is what the trainer has set."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # PyTorch's own handler of SIGTERM ends the worker whoever sends it. A blocked signal goes to the thread that waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _obey(trainer: int) -> None:
    """End this process when the process `trainer` terminates it: Python does so when it exits, and then waits for it.

    A worker whose trainer is gone notices that by itself, within seconds.
    """
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != trainer:
        pass
    os._exit(0)
