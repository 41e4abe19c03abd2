"""Data loaders' workers: a stranger's signal does not end them, their trainer's does, and they are seeded as they were."""

import multiprocessing
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.wrapped import llama
from transformers import Trainer, TrainingArguments

from axolotl_brainstacks.curriculum.workers import keep_workers


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        dataloader_num_workers=2, dataloader_pin_memory=False, report_to=[],
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 32, "labels": [[1, 2]] * 32})
    return Trainer(llama(), args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("name", ["get_train_dataloader", "get_eval_dataloader"])
def test_workers_obey_their_trainer_alone(trainer: Trainer, name: str) -> None:
    keep_workers(trainer)
    before = set(multiprocessing.active_children())
    batches = iter(getattr(trainer, name)())
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    for _ in range(24):
        next(batches)
    for worker in workers:
        assert worker.is_alive()
        worker.terminate()  # as Python does to its daemons before it exits, and then it waits for them
        worker.join(20)
        assert worker.exitcode == 0


def test_workers_have_the_seeds_that_the_trainer_gives_them(trainer: Trainer) -> None:
    def seeds() -> list[int]:
        torch.manual_seed(5)
        return [int(batch["seed"]) for batch in trainer.get_train_dataloader()]

    trainer.data_collator = lambda rows: {"seed": torch.tensor(torch.initial_seed())}
    expected = seeds()
    keep_workers(trainer)
    assert seeds() == expected and len(expected) == 32
