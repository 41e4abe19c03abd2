"""What the tests of the library share: a library of random stacks, and damage to its files."""

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import ConstraintRecord, DomainEntry, RoundRecord
from axolotl_brainstacks.library.manifest import BaseModelInfo

CONFIG = {"peft_type": "BRAINSTACKS", "r": 4, "target_modules": {"v_proj", "q_proj"}}
KEY = "base_model.model.layers.0.q_proj.brainstacks_"


def some_tensors(rows: int = 8) -> dict[str, Tensor]:
    bank = torch.randn(2 * rows, 16)  # slices of one storage, as a fused bank gives them
    return {KEY + "A.weight": bank[:rows], KEY + "B.weight": bank[rows:].T}


def a_round(number: int = 1, kept: bool = True, loss: float = 1.5) -> RoundRecord:
    return RoundRecord(
        round=number, kept=kept, loss_before=2.5, loss_after=loss, steps=7, stop_reason="max_steps", metrics={"b": 1.0}
    )


def a_domain(name: str, context: list[str] | None = None) -> DomainEntry:
    return DomainEntry(name=name, base_loss=2.5, context=context or [])


def a_constraint(protects: list[str], capacity_left: float = 0.75) -> ConstraintRecord:
    return ConstraintRecord(
        protects=protects,
        columns=4,
        energy=0.5,
        energies=dict.fromkeys(protects, 0.5),
        capacity_left=capacity_left,
        tightest="layers.0.q_proj",
        capacity={"q_proj": capacity_left},
    )


def new_library(path: Path, *domains: str, base: BaseModelInfo | None = None) -> Library:
    fingerprint = torch.randn(32).tolist()
    library = Library.create(path, base or BaseModelInfo(name="tiny", config_hash="0" * 64, fingerprint=fingerprint))
    with library.writing():
        for name in domains:
            library.add_domain(a_domain(name), f"rows of {name}".encode())
            library.add_stack(name, 1, CONFIG, some_tensors(), a_round())
    return library


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return new_library(tmp_path / "library", "chat", "code")


def weights(library: Library, name: str) -> Path:
    return library.stack_path(name) / "adapter_model.safetensors"


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def alter_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
