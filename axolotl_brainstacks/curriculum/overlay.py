"""A domain's overlay: the ordinary Axolotl keys in its entry, laid over the base config."""

from __future__ import annotations

import copy
from typing import Any

from axolotl.integrations.config import merge_input_args

from axolotl_brainstacks.args import DomainArgs, nearest

EVALUATION = ("eval_steps", "evals_per_epoch", "eval_strategy")
SAVING = ("save_steps", "saves_per_epoch", "save_strategy")
# Axolotl does not allow two of a group side by side.
_EXCLUSIVE = (EVALUATION, SAVING, ("val_set_size", "test_datasets"), ("max_steps", "num_epochs"))

# The model, its precision and the engine are set up once for all stages.
_LOAD_TIME = {
    *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "plugins"),
    *("base_model", "base_model_config", "revision_of_model", "type_of_model", "model_type", "processor_type"),
    *("tokenizer_config", "tokenizer_type", "special_tokens", "added_tokens_overrides", "chat_template"),
    *("load_in_4bit", "load_in_8bit", "bf16", "fp16", "tf32", "bfloat16", "float16", "torch_compile"),
    *("attn_implementation", "flash_attention", "sdp_attention", "xformers_attention", "flex_attention"),
    *("sample_packing", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("deepspeed", "fsdp", "fsdp_config", "ddp", "use_ray"),
    *("output_dir", "brainstacks", "seed"),
}


def check_overlay(domain: DomainArgs) -> None:
    """Raises ValueError for a key that Axolotl does not know (it would ignore it), or that cannot differ by domain."""
    known = merge_input_args()[1].model_fields
    for key in domain.overlay:
        if key not in known:
            raise ValueError(
                f"brainstacks.domains: `{key}` of domain `{domain.name}` is not an Axolotl key{nearest(key, known)}"
            )
        if key in _LOAD_TIME:
            raise ValueError(
                f"brainstacks.domains: `{key}` of domain `{domain.name}` has to be the same for all domains; "
                "move it to the top level"
            )


def overlaid(raw: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The base config under a domain's keys; a key also replaces those that Axolotl does not allow beside it."""
    merged = copy.deepcopy(raw)
    for group in _EXCLUSIVE:
        if any(key in overlay for key in group):
            for key in group:
                merged.pop(key, None)
    merged |= copy.deepcopy(overlay)
    if merged.get("val_set_size") is None and not merged.get("test_datasets"):
        merged["val_set_size"] = 0.05
    return merged
