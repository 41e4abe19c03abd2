"""What PEFT asks of a tuner: which modules to wrap, the wrapped projections, and the adapter in training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import BatchTokens
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.registration import PREFIX
from axolotl_brainstacks.adapter.tensors import is_stack_key, stack_tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ProjectionTuner(BaseTuner):
    """Wraps a model's projections, and trains, exports and constrains a stack on top of them.

    The stack in training is a PEFT adapter. `StackTuner` adds the frozen stacks.
    """

    prefix: str = PREFIX
    tuner_layer_cls = BrainstacksLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, BrainstacksConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(PROJECTIONS)
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        assert isinstance(peft_config, BrainstacksConfig)
        found = super()._check_target_module_exists(peft_config, key)
        if found and not key.startswith(self._language_model_prefixes()):
            self._left_out.append(key)
            return False
        whole_names = () if isinstance(peft_config.target_modules, str) else peft_config.target_modules or ()
        if found and peft_config.layers_to_transform is not None and key in whole_names:
            # PEFT expands "all-linear" to full module names, and it applies `layers_to_transform` only to modules that are named
            # by their suffix. So ask it about the suffix.
            by_end = copy.copy(peft_config)
            by_end.target_modules = [key.rpartition(".")[2]]
            return "." in key and super()._check_target_module_exists(by_end, key)
        return found

    def _language_model_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the modules that read or write text, such as "model.language_model."; ("",) for a text-only model.

        The vision and audio towers of a composite model are not wrapped.
        """
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
            return ("",)
        parts = [self.model.get_decoder()]
        if config.is_encoder_decoder and getattr(self.model.get_encoder(), "main_input_name", "") == "input_ids":
            parts.append(self.model.get_encoder())
        paths = [f"{name}." for name, module in self.model.named_modules() if name and module in parts]
        return tuple(paths) or ("",)

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

    def _wrapped(self, module_name: str) -> BrainstacksLinear:
        """The wrapper of the base model's module `module_name`; created if there is none yet.

        Raises:
            ValueError: if the module is no linear layer, or another PeftModel has wrapped it.
            AttributeError: if there is no such module.
        """
        parent, target, target_name = _get_submodules(self.model, module_name)
        if isinstance(target, BrainstacksLinear):
            if target.batch is not self._batch:
                raise ValueError(
                    f"The base model's {module_name} carries Brainstacks already, of another PeftModel or of a load that "
                    "failed: load the base model again"
                )
            return target
        layer = BrainstacksLinear(target, module_name)
        layer._active_adapter = self.active_adapter
        layer.batch = self._batch
        if self._offload is not None:
            layer.offload_frozen(self._offload)
        layer.frozen_dtype = self._frozen_dtype
        layer.requires_grad_(False)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # BaseTuner.__init__ injects the first adapter, so a subclass's own __init__ would set these attributes too late.
        self._batch = BatchTokens()
        self._offload: Offload | None = None
        self._frozen_dtype: torch.dtype | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        assert isinstance(config, BrainstacksConfig)
        config.check_library_alone()
        self._left_out: list[str] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            if not self._left_out:
                raise
            raise NoMatchingPeftModuleError(
                f"`target_modules` is {config.target_modules!r}, which matches modules outside of the language model only, "
                f"such as {self._left_out[0]!r}, but stacks wrap the language model alone: name modules of "
                f"{' or '.join(prefix.rstrip('.') for prefix in self._language_model_prefixes())}"
            ) from error

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors of a folder. PEFT calls this before it copies them, and it would overwrite base weights as well.

        Raises:
            ValueError: for a tensor that belongs neither to a stack nor to a module that the adapter may save.
        """
        if foreign := [key for key in state_dict if not is_stack_key(key)]:
            known = _saved_module_keys(model, adapter_name)
            if not config.inference_mode:
                known |= _embedding_keys(model)
            if unknown := [key for key in foreign if key not in known]:
                raise ValueError(
                    f"The adapter's weights hold {unknown[0]!r}, which is no tensor of a stack and would replace a weight "
                    "of the base model: restore the file from a copy"
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Reject `adapter_names`, PEFT's argument for several adapters in a batch, which it would silently drop here."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Brainstacks routes rows by stack weights, not by `adapter_names`; see `use_stacks`")
        yield

    def brainstacks_layers(self) -> Iterator[BrainstacksLinear]:
        """All wrapped projections, in the order of the model's modules."""
        return (module for module in self.model.modules() if isinstance(module, BrainstacksLinear))

    # The stack in training

    def reset_stack(self, adapter_name: str, seed: int) -> None:
        """Give a trainable stack fresh weights, which change no output.

        Args:
            adapter_name: of the stack.
            seed: determines the weights, with the names of the modules.
        """
        for layer in self.brainstacks_layers():
            if adapter_name in layer.shapes:
                layer.reset_stack(adapter_name, seed)

    def export_stack(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of the trainable stack's PEFT file, on the CPU in fp32, with B projected out of the null space's basis.

        Every rank must call this, because sharded parameters are gathered, one projection at a time.
        """
        layers = [layer for layer in self.brainstacks_layers() if adapter_name in layer.shapes]
        return stack_tensors({layer.module_name: layer.export_stack(adapter_name) for layer in layers})

    def set_null_space(self, adapter_name: str, bases: Mapping[str, Tensor]) -> None:
        """Constrain the outputs of a trainable stack.

        Args:
            adapter_name: of the stack.
            bases: by module name, (out, d) orthonormal columns that the output must have no component along. Projections
                without an entry are unconstrained.
        """
        for layer in self.brainstacks_layers():
            if adapter_name in layer.shapes:
                basis = bases.get(layer.module_name)
                a, b = layer.trained(adapter_name)
                b.basis = None if basis is None else basis.to(a.weight.device, torch.float32)


def _embedding_keys(model: nn.Module) -> set[str]:
    """Names of the embedding weights, which PEFT saves with an adapter when the vocabulary was resized."""
    layers = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is layer for layer in layers)}


def _saved_module_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Names of the tensors of `modules_to_save`. PEFT trains a copy of each such module and keeps the original."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }
