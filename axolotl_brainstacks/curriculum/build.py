"""Puts the adapter around Axolotl's base model: a fresh stack on top of the library's frozen ones."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import bitsandbytes as bnb
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.injection import PROJECTIONS
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.distributed import is_main
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.serving.model import BrainstacksModel
from axolotl_brainstacks.serving.routes import load_router

LOG = get_logger(__name__)

ADAPTER_NAME = "default"


def build_adapter(model: PreTrainedModel, cfg: DictDefault, plan: Plan) -> tuple[PeftModel, PeftConfig]:
    """Put the adapter around the base model, in place of Axolotl's own LoRA.

    Returns:
        The model that Axolotl trains or answers with, and its PEFT config.

    Raises:
        ValueError: if the library belongs to another base model; or, for answering, if there is no library, it has no
            stacks, or its router cannot be used.
    """
    keep_cpu_4bit_trainable(model)
    if plan.inference:
        if not Library.exists(plan.library_path):
            raise ValueError(
                f"There is no library at {plan.library_path}; run `axolotl train` first, or set `brainstacks.library`"
            )
        peft_model = PeftModel.from_pretrained(model, str(plan.library_path))
        # PEFT has read the folder just now. The pin is checked again, because the folder may have changed since the plan
        # was made.
        if plan.block.library_sha256:
            Library.open(plan.library_path, plan.block.library_sha256)
        answering = tuner(peft_model)
        assert answering.resident is not None
        answering.resident.manifest.check_frozen_dtype(plan.block.frozen_dtype)
        answering.show_routes = True
        if plan.block.offload_frozen:
            answering.offload_frozen()
        if not plan.makes_router:  # making a router measures all stacks together, so they all have to fit
            answering.resident.max_bytes = plan.block.max_resident_bytes
        if not answering.stacks:
            raise ValueError(f"{plan.library_path} has no stacks to answer with: run `axolotl train`")
        if not plan.makes_router:
            load_router(answering)
        return peft_model, peft_model.peft_config[ADAPTER_NAME]
    config = stack_config(cfg, plan)
    peft_model = get_peft_model(model, config)
    check_targets(tuner(peft_model), config.target_modules)
    if plan.block.offload_frozen:
        tuner(peft_model).offload_frozen()
    # `preflight.done_domains` has checked that the library has the same dtype.
    tuner(peft_model).set_frozen_dtype(plan.block.frozen_dtype)
    if Library.exists(plan.library_path):
        attach_library(tuner(peft_model), Library.open(plan.library_path), cfg.base_model)
    if is_main():
        if plan.block.offload_frozen:
            LOG.info("Frozen stacks stay in CPU memory")
        peft_model.print_trainable_parameters()
        report_quantization(tuner(peft_model), cfg)
    return peft_model, config


def stack_config(cfg: DictDefault, plan: Plan) -> BrainstacksConfig:
    """The PEFT config of a fresh stack, from Axolotl's `lora_*` keys and the `brainstacks:` block."""
    block = plan.block
    targets = cfg.lora_target_modules
    return BrainstacksConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=cfg.base_model,
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout or 0.0,
        use_rslora=cfg.peft_use_rslora is not False,
        num_experts=block.num_experts,
        top_k=block.top_k,
        noisy_gate=block.noisy_gate,
        balance_coef=block.balance_coef,
        target_modules="all-linear" if cfg.lora_target_linear and not targets else targets,
        exclude_modules=cfg.lora_exclude_modules or None,
        layers_to_transform=cfg.peft_layers_to_transform,
        layers_pattern=cfg.peft_layers_pattern,
    )


def check_targets(model: StackTuner, targets: Collection[str] | str | None) -> None:
    """Raises ValueError if `targets` names a projection that the model lacks.

    The default projections are exempt: a model may lack some of them.
    """
    wrapped = [f".{layer.module_name}" for layer in model.brainstacks_layers()]
    for target in () if isinstance(targets, str) else targets or ():
        if target not in PROJECTIONS and not any(name.endswith(f".{target}") for name in wrapped):
            raise ValueError(
                f"`lora_target_modules` names {target!r}, but the base model has no such linear module; wrapped are "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in wrapped}))}"
            )


def attach_library(tuner: StackTuner, library: Library, model_name: str) -> None:
    """Attach all stacks of `library`, oldest first; old stacks of a domain that is being replaced are included.

    Raises:
        ValueError: if the library was made for another base model, or one of its files is missing or altered.
    """
    library.manifest.base.check(BaseModelInfo.of(tuner.model, model_name))
    for entry in library.manifest.stacks:
        config = BrainstacksConfig.of_stack(entry.name, library.stack_config(entry.name))
        tuner.attach_stack(entry.name, entry.domain, config, library.stack_tensors(entry.name))


def stand_for_library(model: PeftModel, adapter: str, base_model: str, library: str) -> None:
    """Make `save_pretrained` write a PEFT folder without weights that refers to `library`.

    The folder has neither the stack in training nor the embeddings that PEFT saves if the vocabulary was resized, because
    loading it takes weights from the library's stacks only.

    Args:
        adapter: PEFT's name of the stack in training.
        library: the library's path, relative to the folder that will be saved.
    """
    for layer in tuner(model).brainstacks_layers():
        layer.delete_adapter(adapter)
    model.peft_config[adapter] = BrainstacksConfig.for_library(base_model, library)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]


def tuner(peft_model: PeftModel) -> BrainstacksModel:
    """The tuner inside a PEFT model."""
    base = peft_model.base_model
    assert isinstance(base, BrainstacksModel)
    return base


def report_quantization(model: StackTuner, cfg: DictDefault) -> None:
    """Log how many of the wrapped projections are quantised.

    Raises:
        ValueError: if the config asks for quantisation and no projection is quantised, because training would take many
            times the memory.
    """
    if not (cfg.load_in_4bit or cfg.load_in_8bit):
        return
    bits, kind = (4, bnb.nn.Linear4bit) if cfg.load_in_4bit else (8, bnb.nn.Linear8bitLt)
    layers = [layer.get_base_layer() for layer in model.brainstacks_layers()]
    count = sum(isinstance(layer, kind) for layer in layers)
    LOG.info("%d-bit layers: %d of %d wrapped projections", bits, count, len(layers))
    if not count:
        raise ValueError(f"`load_in_{bits}bit: true` is set but the base model was loaded without quantisation")


def keep_cpu_4bit_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 weights on a CPU.

    bitsandbytes repacks them for its bf16 kernel in the first forward in evaluation mode, and after that no gradient flows
    through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
