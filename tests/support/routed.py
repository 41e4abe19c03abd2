"""What the tests of the router share: a tiny model with a library of living random stacks, and rows to route."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.evaluation import IGNORED, Example, pack_rows
from axolotl_brainstacks.library import DomainEntry, Library, RoundRecord
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.router.router import routable_domains
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.serving.model import BrainstacksModel

VOCABULARY = 96
ROUND = RoundRecord(round=1, kept=True, loss_before=2.0, loss_after=1.0, steps=1, stop_reason="finished")


def tiny_base() -> LlamaForCausalLM:
    """A random Llama of four layers, in fp32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
        )
    ).eval()


def add_domain(
    library: Library,
    base: PreTrainedModel,
    name: str,
    stacks: int = 1,
    rows: Sequence[Example] = (),
    scale: float = 0.15,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Add a finished domain with random stacks that change losses in both directions, and its validation rows."""
    shape = {"r": 2, "lora_alpha": 2, "num_experts": 3, "top_k": 2} | settings
    model = get_peft_model(deepcopy(base), BrainstacksConfig(task_type="CAUSAL_LM", **shape))
    tuner = tuner_of(model)
    with library.writing():
        library.add_domain(DomainEntry(name=name, base_loss=2.0), pack_rows(rows) if rows else None)
        for number in range(1, stacks + 1):
            tensors = {key: torch.randn_like(tensor) * scale for key, tensor in tuner.export_stack("default").items()}
            record = ROUND.model_copy(update={"round": number})
            library.add_stack(name, number, model.peft_config["default"].to_dict(), tensors, record)
        library.update_domain(name, done=True)


def new_library(
    path: Path, base: PreTrainedModel, domains: Sequence[str], stacks: int = 1, scale: float = 0.15
) -> Library:
    """A library of finished domains that PEFT can load; their validation rows are fresh random ones."""
    library = Library.create(path, BaseModelInfo.of(base, "tiny"))
    for name in domains:
        add_domain(library, base, name, stacks, random_rows(10, Random(name)), scale=scale)
    with library.writing():
        library.write_root_config(BrainstacksConfig.for_library("tiny", ".").to_dict())
    return library


def tuner_of(model: PeftModel) -> BrainstacksModel:
    assert isinstance(model.base_model, BrainstacksModel)
    return model.base_model


def meter_of(library: Library, base: PreTrainedModel, batch_size: int = 8) -> LossMeter:
    """Load the library around a copy of `base`, as any PEFT program does, and measure with it."""
    model = PeftModel.from_pretrained(deepcopy(base), str(library.path))
    domains = routable_domains(library.manifest)
    return LossMeter(model, tuner_of(model), domains, library.manifest.stacks, batch_size)


def random_rows(count: int, rng: Random) -> list[Example]:
    """Rows of 6 to 30 tokens; the answer starts anywhere after the first."""
    rows = []
    for _ in range(count):
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(6, 30))]
        start = rng.randint(1, len(tokens) - 2)
        rows.append(Example(tokens, [IGNORED] * start + tokens[start:]))
    return rows
