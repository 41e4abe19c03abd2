"""What the tests of the adapter share: tiny wrapped models and living stacks."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from axolotl_brainstacks.adapter import BrainstacksConfig, BrainstacksLinear
from axolotl_brainstacks.serving.model import BrainstacksModel

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    """A fresh random float32 Llama."""
    return LlamaForCausalLM(LlamaConfig(**TINY | changes))


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def wrap(base: torch.nn.Module | None = None, **settings: Any) -> PeftModel:
    """A model with a fresh stack `default`."""
    config = BrainstacksConfig(task_type="CAUSAL_LM", **{"r": 2, "num_experts": 3, "top_k": 2} | settings)
    return get_peft_model(base if base is not None else llama(), config)


def tuner_of(model: PeftModel) -> BrainstacksModel:
    assert isinstance(model.base_model, BrainstacksModel)
    return model.base_model


def layers_of(model: PeftModel) -> list[BrainstacksLinear]:
    return list(tuner_of(model).brainstacks_layers())


@torch.no_grad()
def revive(model: PeftModel, adapter: str = "default", scale: float = 0.3) -> None:
    """Random weights in place of a fresh stack's: gates that differ by token, noise, B not zero."""
    for layer in layers_of(model):
        if adapter in layer.shapes:
            n = layer.shapes[adapter].num_experts
            layer.brainstacks_A[adapter].weight[: 2 * n].normal_(std=scale)
            layer.brainstacks_B[adapter].weight.normal_(std=scale)


def freeze(
    model: PeftModel, names: Sequence[str] | Iterable[str], domain: str = "chat"
) -> dict[str, dict[str, Tensor]]:
    """Attach random frozen stacks of the shape of `default`, which is random afterwards; returns their tensors."""
    exported = {}
    for name in names:
        revive(model)
        exported[name] = tuner_of(model).export_stack("default")
        config = model.peft_config["default"]
        assert isinstance(config, BrainstacksConfig)
        tuner_of(model).attach_stack(name, domain, config, exported[name])
    revive(model)
    return exported


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (rows, length))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def assert_near(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest deviation, as a share of the largest value expected; in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, what
    worst, size = float((got - expected).abs().max()), float(expected.abs().max())
    assert worst <= tolerance * size, f"{what}: off by {worst:.3g} where values reach {size:.3g}"


def gemma3() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=dict(TINY), vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
        )
    )
