"""Overlays: the ordinary Axolotl keys in the entry of a domain or an RL round, merged over the config above it."""

from __future__ import annotations

import copy
from typing import Any

from axolotl.integrations.config import merge_input_args

from axolotl_brainstacks.args import DomainArgs
from axolotl_brainstacks.config_errors import nearest
from axolotl_brainstacks.curriculum.checks import check_refused
from axolotl_brainstacks.curriculum.rl_checks import check_settings, rl_title

EVALUATION = ("eval_steps", "evals_per_epoch", "eval_strategy")
SAVING = ("save_steps", "saves_per_epoch", "save_strategy")
# Axolotl refuses a config with two keys of one group.
_EXCLUSIVE = (EVALUATION, SAVING, ("val_set_size", "test_datasets"), ("max_steps", "num_epochs"))

# The model, its tokenizer and precision, the adapter and the engine's settings are fixed once, before the first round.
_LOAD_TIME = {
    *("adapter", "base_model", "base_model_config", "brainstacks", "cls_model_config", "is_falcon_derived_model"),
    *("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model", "model_type", "num_labels"),
    *("output_dir", "plugins", "reinit_weights", "revision_of_model", "rope_scaling", "seed", "trust_remote_code"),
    *("type_of_model", "added_tokens_overrides", "chat_template", "chat_template_jinja", "embeddings_skip_upcast"),
    *("mean_resizing_embeddings", "processor_kwargs", "processor_type", "resize_token_embeddings_to_32x"),
    *("shrink_embeddings", "special_tokens", "tokens", "bf16", "bfloat16", "float16", "float32", "fp16", "gptq"),
    *("load_in_4bit", "load_in_8bit", "nf4_backend", "qat", "quantization", "quantize_moe_experts", "tf32"),
    *("activation_offloading", "attn_implementation", "eager_attention", "experts_implementation", "fused_attn_kernel"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "large_head_attention", "layer_offloading"),
    *("sage_attention", "sample_packing", "s2_attention", "selective_checkpointing", "sdpa_varlen", "use_kernels"),
    *("use_onebitllms", "xformers_attention", "batch_flattening", "context_parallel_size", "deepcompile", "deepspeed"),
    *("device", "device_map", "gpu_memory_limit", "heads_k_stride", "local_rank", "low_cpu_mem_usage", "max_memory"),
    *("ring_attn_func", "sequence_parallel_degree", "strict", "tensor_parallel_size", "use_ray", "world_size"),
}
_LOAD_TIME_PREFIXES = (
    *("bnb_", "ddp", "dp_", "flash_", "flex_", "fp32_norm", "fp8", "freeze_", "fsdp", "lora_", "mixlora_"),
    *("model_quantization", "overrides_of_", "peft", "relora", "sdp_", "tiled_mlp", "tokenizer_", "torch_compile"),
)


def check_overlay(domain: DomainArgs) -> None:
    """Raises ValueError for a key that Axolotl does not know, and would ignore, or that cannot differ by domain."""
    if domain.overlay.get("rl"):
        raise ValueError(
            f"`rl` of domain `{domain.name}` is {domain.overlay['rl']!r}, but `rl` belongs into `rl_rounds:` of the domain that "
            f"it refines: write `rl_rounds: [{{rl: {domain.overlay['rl']}, datasets: [...]}}]` in the entry of `{domain.name}`, "
            "and give the entry itself supervised `datasets:` (the chosen answers of preference pairs serve)"
        )
    _check_keys(domain.overlay, f"domain `{domain.name}`")
    for number, entry in enumerate(domain.rl_rounds):
        where = rl_title(domain.name, number)
        _check_keys(entry.overlay, where)
        check_settings(entry, where)


def _check_keys(overlay: dict[str, Any], where: str) -> None:
    check_refused(overlay, f" of {where}")
    known = merge_input_args()[1].model_fields
    for key in overlay:
        if key not in known:
            raise ValueError(f"brainstacks.domains: `{key}` of {where} is not an Axolotl key{nearest(key, known)}")
        if key in _LOAD_TIME or key.startswith(_LOAD_TIME_PREFIXES):
            raise ValueError(
                f"brainstacks.domains: `{key}` of {where} has to be the same for all domains; move it to the top level"
            )


def overlaid(raw: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Merge an overlay into a config.

    Args:
        raw: the config, as in the YAML; it is not changed.
        overlay: the keys that replace its keys. A key also removes those that Axolotl refuses beside it (`_EXCLUSIVE`).

    Returns:
        The merged config. 5 % of the data are held out if it names no validation data.
    """
    merged = copy.deepcopy(raw)
    for group in _EXCLUSIVE:
        if any(key in overlay for key in group):
            for key in group:
                merged.pop(key, None)
    merged |= copy.deepcopy(overlay)
    if merged.get("val_set_size") is None and not merged.get("test_datasets"):
        merged["val_set_size"] = 0.05
    return merged


def overlaid_rl(domain: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The complete config of an RL round.

    The round inherits the domain's config without its datasets, whose examples have another form. Sample packing is off and
    columns stay, because TRL's trainers cannot pack and read columns besides the tokens.

    Args:
        domain: the domain's complete config.
        overlay: the keys of the entry in `rl_rounds:`.
    """
    defaults: dict[str, Any] = {"remove_unused_columns": False}
    if overlay["rl"] == "simpo":
        defaults["simpo_gamma"] = 0.5  # TRL's default; Axolotl passes None if the key is missing
    overlay = defaults | overlay
    own = {key: value for key, value in domain.items() if key not in ("datasets", "test_datasets")}
    return overlaid(own, overlay | {"sample_packing": False, "eval_sample_packing": False})
