"""Libraries of random stacks for the benchmarks that need one on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models import another, random_stack, tuner_of, with_stacks
from peft import PeftModel
from transformers import PreTrainedModel

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.library import DomainEntry, Library, RoundRecord
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.names import FrozenDtype

NAME = "random"


def new_library(
    path: Path,
    base: PreTrainedModel,
    domains: Sequence[str],
    stacks: int,
    scale: float = 0.001,
    frozen_dtype: FrozenDtype = None,
) -> Library:
    """A library of finished domains with `stacks` random stacks each, that PEFT can load."""
    library = Library.create(path, BaseModelInfo.of(base, NAME), frozen_dtype)
    model = with_stacks(base)
    config = model.peft_config["default"].to_dict()
    with library.writing():
        library.write_root_config(BrainstacksConfig.for_library(NAME, ".").to_dict())
        for domain in domains:
            library.add_domain(DomainEntry(name=domain, base_loss=2.0))
            for number in range(1, stacks + 1):
                record = RoundRecord(
                    round=number, kept=True, loss_before=2.0, loss_after=1.0, steps=1, stop_reason="finished"
                )
                library.add_stack(domain, number, config, random_stack(tuner_of(model), scale), record)
            library.update_domain(domain, done=True)
    return library


def load(library: Library, base: PreTrainedModel) -> PeftModel:
    """The library around a copy of the base model, as any PEFT program loads it."""
    return PeftModel.from_pretrained(another(base), str(library.path)).eval()
