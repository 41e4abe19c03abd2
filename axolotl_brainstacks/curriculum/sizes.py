"""Computes the sizes of stacks on disk and in memory from the base model's shapes, without loading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from peft import get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedModel,
)

from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.tensors import stack_tensors
from axolotl_brainstacks.curriculum.build import ADAPTER_NAME, stack_config, tuner

if TYPE_CHECKING:
    from axolotl_brainstacks.curriculum.plan import Plan

FP32 = 4
# Bytes per weight. NF4 with double quantisation: half a byte, one byte of scale per 64 weights, and an fp32 scale per 256
# of these scales.
_NF4 = 1 / 2 + 1 / 64 + FP32 / (64 * 256)
_INT8 = 1.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of stacks on one base model. All results are in bytes.

    base: the base model in memory, about.
    layers: its projections, wrapped with a stack in training, on the meta device.
    """

    base: int
    layers: Sequence[BrainstacksLinear]
    optimizer: str

    @classmethod
    def of(cls, plan: Plan, cfg: DictDefault) -> Sizes:
        """Build the base model that `cfg` names on the meta device and wrap it as training will.

        Raises:
            ValueError: if Transformers has no class for the model, so that its shapes cannot be known without its code.
        """
        model = meta_model(cfg)
        base = base_bytes(model, cfg)
        # A fresh stack draws its seed from the global generator, and a run has to learn the same with and without its plan.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            wrapped = tuner(get_peft_model(model, stack_config(cfg, plan)))
        wrapped.set_frozen_dtype(plan.block.frozen_dtype)
        return cls(base, list(wrapped.brainstacks_layers()), str(cfg.optimizer))

    @cached_property
    def stack_file(self) -> int:
        """The exact size of a stack's `adapter_model.safetensors`."""
        tensors = stack_tensors({layer.module_name: _weights(layer) for layer in self.layers})
        return safetensors_bytes({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def frozen_stack(self) -> int:
        """A frozen stack in memory."""
        return sum(layer.bank_bytes(layer.shapes[ADAPTER_NAME]) for layer in self.layers)

    @property
    def trained_stack(self) -> int:
        """The stack in training: fp32 weights, fp32 gradients, and the optimiser's state."""
        numbers = sum(weight.numel() for layer in self.layers for weight in _weights(layer))
        return numbers * (2 * FP32 + state_bytes(self.optimizer))

    def null_space(self, directions: int) -> int:
        """`directions` fp32 columns per projection; a projection has at most as many as outputs."""
        return FP32 * sum(layer.out_features * min(directions, layer.out_features) for layer in self.layers)


def _weights(layer: BrainstacksLinear) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = layer.trained(ADAPTER_NAME)
    return a.weight, b.weight


def meta_model(cfg: DictDefault) -> PreTrainedModel:
    """Build the base model on the meta device.

    This calls the model's class directly, because with `deepspeed:` set `from_config` would shard the model. Raises
    ValueError if Transformers has no class for it.
    """
    config = load_model_config(cfg)
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    for mapping in reversed(mappings) if cfg.is_multimodal else mappings:
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            with torch.device("meta"):
                model: PreTrainedModel = kind(config).to(cfg.torch_dtype)
            model.tie_weights()
            return model
    raise ValueError(f"Transformers has no model class for {type(config).__name__}")


def base_bytes(model: PreTrainedModel, cfg: DictDefault) -> int:
    """Roughly the bytes of the base model as loaded. Quantisation covers its linear layers except the output head."""
    each = _NF4 if cfg.load_in_4bit else _INT8
    quantised = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        if cfg.load_in_4bit or cfg.load_in_8bit
    }
    return round(
        sum(
            parameter.numel() * (each if id(parameter) in quantised else parameter.element_size())
            for parameter in model.parameters()
        )
    )


def state_bytes(optimizer: str) -> int:
    """Roughly the bytes per weight that an optimiser keeps; an unknown one is taken to keep two moments, as most do."""
    if "sgd" in optimizer or "adafactor" in optimizer:
        return 0
    moments = 1 if "lion" in optimizer or "muon" in optimizer else 2
    return moments * (1 if "8bit" in optimizer else FP32)


def safetensors_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """The exact size of a safetensors file with fp32 tensors of these shapes, its header included."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + FP32 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
