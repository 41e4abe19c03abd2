"""Checks ordinary Axolotl keys for values that Axolotl would accept and ignore, or fail on only after hours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from transformers.training_args import OptimizerNames

from axolotl_brainstacks.config_errors import nearest

# Keys that no run may set, each with the reason and, where there is one, the alternative.
REFUSED = {
    "merge_lora": "a stack's gates depend on the token, so it cannot be merged into the base weights; "
    "load the library with PeftModel.from_pretrained instead",
    "relora": "stacks are frozen, not merged; use brainstacks.boosting.max_rounds",
    "lora_model_dir": "the library is named by `brainstacks.library`",
    "resume_from_checkpoint": "the same `axolotl train` command resumes by itself",
    "fsdp": "FSDP is not supported; use `deepspeed:`",
    "fsdp_config": "FSDP is not supported; use `deepspeed:`",
    "save_only_model": "an interrupted round could not be resumed",
    "reward_model": "reward models are not supported",
    "trainer_cls": "every round has Axolotl's own trainer",
    "process_reward_model": "reward models are not supported",
    "peft_use_dora": "stacks have no DoRA magnitude",
    "loraplus_lr_ratio": "a stack has no LoRA+ groups; use `learning_rate`",
    "lora_rank_pattern": "all projections of a stack have the rank `lora_r`",
    "lora_alpha_pattern": "all projections of a stack have the scale of `lora_alpha`",
    "peft_init_lora_weights": "a fresh stack is always the identity",
    "peft_layer_replication": "the base model is shared by all domains and must stay as it is",
    "peft_trainable_token_indices": "the base model is shared by all domains and must stay as it is",
    "lora_modules_to_save": "the base model is shared by all domains and must stay as it is",
    "lora_target_parameters": "stacks wrap linear modules; name them in `lora_target_modules`",
    "unfrozen_parameters": "the base model is shared by all domains and must stay as it is",
}
OPTIMIZERS = {str(name.value) for names in (OptimizerNames, CustomSupportedOptimizers) for name in names}
# Keys that have no default, so that a missing one is an error.
_REQUIRED = ("base_model", "learning_rate")


def check_refused(keys: dict[str, Any], where: str = "") -> None:
    """Raises ValueError if a key of `REFUSED` is set.

    Args:
        where: of an overlay, its owner, as " of domain `math`", for the error.
    """
    for key, reason in REFUSED.items():
        if keys.get(key):
            raise ValueError(f"`{key}`{where} cannot be used with `adapter: brainstacks`: {reason}")


def check_places(cfg: dict[str, Any]) -> None:
    """Raises ValueError if `base_model` is a path where nothing is, or `output_dir` is not or cannot become a folder."""
    model = str(cfg.get("base_model") or "")
    if model.startswith(("/", ".", "~")) and not Path(model).exists():
        raise ValueError(
            f"`base_model` is {model}, and there is no such folder: correct the path, or name a model on the hub"
        )
    folder = Path(cfg["output_dir"]).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"`output_dir` is {cfg['output_dir']}, but {above} is a file: name a folder")


def check_values(cfg: dict[str, Any], owner: str, overlay: dict[str, Any]) -> None:
    """Raises ValueError for a value that cannot be trained with.

    Args:
        cfg: the complete config of a domain or an RL round.
        owner: that domain or RL round, in words.
        overlay: the keys in the owner's own entry; the error names the owner only for these.
    """
    for key, (holds, rule) in _RULES.items():
        value = cfg.get(key)
        if value is None and key not in _REQUIRED:
            continue
        where = f" of {owner}" if key in overlay else ""
        if value is None:
            raise ValueError(f"`{key}` is missing; it {rule}")
        if not holds(value):
            hint = nearest(str(value), OPTIMIZERS) if key == "optimizer" else ""
            raise ValueError(f"`{key}`{where} is {value!r}; it {rule}{hint}")


def _number(value: Any) -> float:
    """A number from the YAML, which reads 1e-4 as a string; NaN for anything that is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _whole(value: Any) -> bool:
    return _number(value) >= 1 and _number(value).is_integer()


def _positive(value: Any) -> bool:
    return 0 < _number(value) < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _datasets(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) and _text(entry.get("path")) for entry in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model": (_text, "must be a model's folder or its name on the hub"),
    "lora_r": (_whole, "must be a whole number of at least 1, the rank of each expert"),
    "lora_alpha": (_positive, "must be greater than 0, or the stacks would change nothing"),
    "lora_dropout": (lambda value: 0 <= _number(value) < 1, "must be in [0, 1)"),
    "learning_rate": (_positive, "must be a number greater than 0"),
    "optimizer": (lambda value: str(value) in OPTIMIZERS, "must be an optimizer that Axolotl knows"),
    "max_steps": (_whole, "must be a whole number of at least 1; leave it out to train `num_epochs`"),
    "num_epochs": (_positive, "must be greater than 0"),
    "micro_batch_size": (_whole, "must be a whole number of at least 1"),
    "eval_batch_size": (_whole, "must be a whole number of at least 1"),
    "gradient_accumulation_steps": (_whole, "must be a whole number of at least 1"),
    "val_set_size": (
        lambda value: 0 <= _number(value) < 1 or (_whole(value) and value != 1),
        "must be a share below 1, or a whole number of examples from 2 on",
    ),
    "datasets": (_datasets, "must be a list of entries that each have a `path:`"),
    "test_datasets": (_datasets, "must be a list of entries that each have a `path:`"),
}
