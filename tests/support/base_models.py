"""What the tests of the base model's record share: models in every kind of load, and a LoRA merged into one."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.base_model import BaseModelInfo

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {"bnb_4bit_use_double_quant": True}
# How a folder is loaded: dtype, and the keys of bitsandbytes' config.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "nf4 of bf16": (torch.bfloat16, NF4),
    "nf4 of fp32": (torch.float32, NF4),
    "double nf4 of bf16": (torch.bfloat16, NF4 | DOUBLE),
    "double nf4 of fp16": (torch.float16, NF4 | DOUBLE),
    "double fp4 of bf16": (torch.bfloat16, NF4 | DOUBLE | {"bnb_4bit_quant_type": "fp4"}),
    "int8 of bf16": (torch.bfloat16, {"load_in_8bit": True}),
    "int8 of fp32": (torch.float32, {"load_in_8bit": True}),
}


def load(folder: Path, kind: str) -> PreTrainedModel:
    dtype, keys = KINDS[kind]
    quantization = {"quantization_config": BitsAndBytesConfig(**keys)} if keys else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization)


def old_record(base: BaseModelInfo) -> BaseModelInfo:
    """As the first version wrote it."""
    return base.model_copy(update={"weights": None, "loaded_as": None, "checkpoint": None})


def make_old(library: Library) -> BaseModelInfo:
    """Leave of the base model's record what the first version wrote; returns the whole one."""
    whole = library.manifest.base
    with library.writing(), library._changing() as manifest:
        manifest.base = old_record(whole)
    return whole


def merged(model: PreTrainedModel, share: float, seed: int = 0) -> PreTrainedModel:
    """A copy with a LoRA of rank 8 merged into every linear layer; its entries' standard deviation is about `share` of
    each matrix's own."""
    torch.manual_seed(seed)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for module in tuned.modules():
            if hasattr(module, "lora_B"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                delta = 8**0.5 * a.std()  # of a sum over the rank, for a B of unit normal entries
                b.normal_(std=float(share * module.base_layer.weight.float().std() / delta))
    return tuned.merge_and_unload()
