"""The PEFT tuner: wraps projections, holds the frozen stacks, switches them on and off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLayer, OutputProjection

if TYPE_CHECKING:
    from axolotl_brainstacks.library import Library

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.brainstacks_(?P<part>[AB])\.weight$")


@dataclass(frozen=True)
class FrozenStack:
    """A stack attached to the model: its name in the library and the domain it belongs to."""

    name: str
    domain: str


class BrainstacksModel(BaseTuner):
    """MoE-LoRA stacks on a frozen base model (paper section 1).

    The stack in training is a PEFT adapter. Frozen stacks are buffers of the layers, outside PEFT's set of adapters: they
    are never trained, never in a checkpoint, and stay on when PEFT disables adapters.
    """

    prefix: str = "brainstacks_"
    tuner_layer_cls = BrainstacksLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, BrainstacksConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(PROJECTIONS)
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        if not key.startswith(self._language_model_prefix()):
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _language_model_prefix(self) -> str:
        """Path of the text decoder in a multimodal model, whose vision and audio towers must stay as they are."""
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
            return ""
        decoder = self.model.get_decoder()
        return next((name + "." for name, module in self.model.named_modules() if module is decoder and name), "")

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, BrainstacksConfig)
        self._wrapped(current_key).update_layer(adapter_name, peft_config)

    def _wrapped(self, module_name: str) -> BrainstacksLayer:
        """The layer around `module_name`, made if it is not there yet."""
        parent, target, target_name = _get_submodules(self.model, module_name)
        if isinstance(target, BrainstacksLayer):
            return target
        layer = BrainstacksLayer(target, module_name)
        layer._active_adapter = self.active_adapter
        layer.requires_grad_(False)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        assert isinstance(config, BrainstacksConfig)
        if config.library is not None:
            from axolotl_brainstacks.library import Library

            attach_library(self, Library.open(config.library), model.config._name_or_path)

    # Frozen stacks

    def layers(self) -> Iterator[BrainstacksLayer]:
        """Every wrapped projection, in the model's order."""
        return (module for module in self.model.modules() if isinstance(module, BrainstacksLayer))

    @property
    def stacks(self) -> list[FrozenStack]:
        """The attached frozen stacks, oldest first."""
        return list(self.__dict__.setdefault("_stacks", []))

    def attach_stack(
        self, name: str, domain: str, config: BrainstacksConfig, tensors: Mapping[str, Tensor]
    ) -> None:
        """Add a frozen stack from the tensors of its PEFT folder, and switch all attached stacks on.

        Raises:
            ValueError: if a tensor is unknown, has no partner, or does not fit the model.
        """
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = _KEY.match(key)
            if match is None:
                raise ValueError(f"Stack {name}: `{key}` is no tensor of a Brainstacks adapter")
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        for module_name, pair in pairs.items():
            if set(pair) != {"A", "B"}:
                raise ValueError(f"Stack {name}: {module_name} has only its {''.join(pair)} matrix; the file is incomplete")
            try:
                layer = self._wrapped(module_name)
            except AttributeError as error:
                raise ValueError(f"Stack {name}: the base model has no module {module_name}") from error
            layer.attach(name, config, pair["A"], pair["B"])
        self.__dict__.setdefault("_stacks", []).append(FrozenStack(name, domain))
        self.use_stacks(None)

    def detach_stack(self, name: str) -> None:
        """Remove a frozen stack, and switch all others on."""
        for layer in self.layers():
            layer.bank.remove(name)
        self._stacks = [stack for stack in self.stacks if stack.name != name]
        self.use_stacks(None)

    def use_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> None:
        """Switch on exactly the frozen stacks `names` (None: all); the trainable stack is not touched.

        Args:
            weights: (rows, len(names)) factor of each stack's output for each row of the batch; None for 1.

        Raises:
            ValueError: if a name is not attached.
        """
        known = [stack.name for stack in self.stacks]
        names = known if names is None else list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"No such stack: {', '.join(unknown)}; attached are {', '.join(known) or 'none'}")
        for layer in self.layers():
            layer.bank.select(names, weights)
        self._on = names

    @contextmanager
    def using_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> Iterator[None]:
        """`use_stacks` for a while; all stacks that were on before are on again afterwards, with weight 1."""
        before = getattr(self, "_on", None)
        self.use_stacks(names, weights)
        try:
            yield
        finally:
            self.use_stacks(before)

    # The stack in training

    def reset_stack(self, adapter_name: str, seed: int) -> None:
        """Make the trainable stack fresh again, the identity."""
        for layer in self.layers():
            if adapter_name in layer.shapes:
                layer.reset_stack(adapter_name, seed)

    def export_stack(self, adapter_name: str) -> dict[str, Tensor]:
        """The trainable stack as its PEFT file holds it, B folded into the null space's complement; CPU, fp32.

        Every rank must call this: sharded parameters are gathered one projection at a time.
        """
        tensors = {}
        for layer in self.layers():
            if adapter_name in layer.shapes:
                a, b = layer.export_stack(adapter_name)
                tensors[f"{_PREFIX}{layer.module_name}.brainstacks_A.weight"] = a
                tensors[f"{_PREFIX}{layer.module_name}.brainstacks_B.weight"] = b
        return tensors

    def set_null_space(self, adapter_name: str, bases: Mapping[str, Tensor]) -> None:
        """Keep the trainable stack off the columns of `bases`: module name -> (out, d). Others are unconstrained."""
        for layer in self.layers():
            if adapter_name in layer.shapes:
                basis, projection = bases.get(layer.module_name), layer.brainstacks_B[adapter_name]
                assert isinstance(projection, OutputProjection)
                weight = layer.brainstacks_A[adapter_name].weight
                projection.basis = None if basis is None else basis.to(weight.device, torch.float32)


def attach_library(tuner: BrainstacksModel, library: Library, model_name: str) -> None:
    """Attach all stacks of `library`, oldest first.

    Raises:
        ValueError: if the library was made for another base model, or one of its files is missing or altered.
    """
    from axolotl_brainstacks.library import BaseModelInfo

    library.manifest.base.check(BaseModelInfo.of(tuner.model, model_name))
    for entry in library.manifest.stacks:
        config = BrainstacksConfig.from_pretrained(str(library.stack_path(entry.name)))
        tuner.attach_stack(entry.name, entry.domain, config, library.stack_tensors(entry.name))


def library_config(base_model: str, library: str) -> BrainstacksConfig:
    """Config of a PEFT folder that stands for a whole library: no stack of its own, all of the library's."""
    return BrainstacksConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        target_modules=DUMMY_TARGET_MODULES,
        library=library,
        inference_mode=True,
    )
