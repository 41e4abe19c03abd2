"""The PEFT tuner: wraps projections, holds the frozen stacks, switches them on and off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import CONFIG_NAME, DUMMY_TARGET_MODULES
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import BatchTokens
from axolotl_brainstacks.adapter.layer import BrainstacksLayer
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.tensors import stack_pairs, stack_tensors

if TYPE_CHECKING:
    from axolotl_brainstacks.args import FrozenDtype
    from axolotl_brainstacks.inference import Domains, PromptRoute
    from axolotl_brainstacks.library import Library
    from axolotl_brainstacks.residency import ResidentStacks
    from axolotl_brainstacks.routing.router import Router

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("auto", "routed", "ungated", "base")


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
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

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
        layer.batch = self._batch
        if self._offload is not None:
            layer.offload_frozen(self._offload)
        layer.frozen_dtype = self._frozen_dtype
        layer.requires_grad_(False)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._stacks: list[FrozenStack] = []
        self._batch = BatchTokens()
        self._offload: Offload | None = None
        self._frozen_dtype: torch.dtype | None = None
        self._on: tuple[list[str], Tensor | None] = [], None
        self._mode = "auto"
        # Whether `_on` waits to be switched on, and perhaps read from disk, at the next forward.
        self._pending = False
        self._library: str | None = None
        self.resident: ResidentStacks | None = None
        self.router: Router | None = None
        self.show_routes = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, BrainstacksConfig)
        if config.library is not None and config.library != self._library:
            self._attach_library(config.library, getattr(model.config, "_name_or_path", "") or type(model).__name__)

    def _attach_library(self, path: str, model_name: str) -> None:
        if not Path(path).is_absolute():
            raise ValueError(
                f"`library` is {path!r}, which counts from the folder of its {CONFIG_NAME}; load it with "
                "`PeftModel.from_pretrained(model, folder)`, or make it absolute"
            )
        if self._stacks:
            raise ValueError(f"The model has stacks already; attach {path} to a fresh base model")
        from axolotl_brainstacks.library import BaseModelInfo, Library
        from axolotl_brainstacks.residency import ResidentStacks

        library = Library.open(path)
        library.manifest.base.check(BaseModelInfo.of(self.model, model_name))
        self.keep_frozen_as(library.manifest.frozen_dtype)
        self.resident = ResidentStacks(self, library)
        self._stacks = [FrozenStack(entry.name, entry.domain) for entry in library.manifest.active_stacks]
        self._library = path
        self.model.get_decoder().register_forward_pre_hook(self._switch_on_pending)
        self.mode = os.environ.get("BRAINSTACKS_MODE", "auto")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to mix adapters in a batch. It would drop `adapter_names` silently."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Brainstacks routes rows by stack weights, not by `adapter_names`; see `use_stacks`")
        yield

    # Frozen stacks

    def layers(self) -> Iterator[BrainstacksLayer]:
        """Every wrapped projection, in the model's order."""
        return (module for module in self.model.modules() if isinstance(module, BrainstacksLayer))

    @property
    def stacks(self) -> list[FrozenStack]:
        """The attached frozen stacks, oldest first."""
        return list(self._stacks)

    def offload_frozen(self) -> None:
        """Keep frozen stacks in CPU memory from here on; a layer's are copied to the GPU while the one before computes.

        Raises:
            ValueError: if a stack is in memory already.
        """
        self._check_none_is_held("offload_frozen")
        self._offload = Offload()
        for layer in self.layers():
            layer.offload_frozen(self._offload)

    def keep_frozen_as(self, dtype: FrozenDtype) -> None:
        """Keep frozen stacks in this type from here on, None for the base model's. A library that is loaded sets its own.

        Raises:
            ValueError: if a stack is in memory already.
        """
        self._check_none_is_held("keep_frozen_as")
        self._frozen_dtype = None if dtype is None else getattr(torch, dtype)
        for layer in self.layers():
            layer.frozen_dtype = self._frozen_dtype

    def _check_none_is_held(self, method: str) -> None:
        if any(layer.bank.names for layer in self.layers()):
            raise ValueError(
                f"Call `{method}` before any stack is in memory: before the first forward or attached stack"
            )

    def attach_stack(self, name: str, domain: str, config: BrainstacksConfig, tensors: Mapping[str, Tensor]) -> None:
        """Add a frozen stack from the tensors of its PEFT folder, and switch all attached stacks on.

        Raises:
            ValueError: if a tensor is unknown, has no partner, or does not fit the model, or the name is attached; then
                nothing of it stays.
        """
        if name in [stack.name for stack in self._stacks]:
            raise ValueError(f"Stack {name} is attached already")
        if self.resident is not None:
            self._select(None)  # a stack on top of a library comes after all of it
        pairs = stack_pairs(name, tensors)
        self._stacks.append(FrozenStack(name, domain))
        try:
            for module_name, (a, b) in pairs.items():
                self.projection(name, module_name).attach(name, config, a, b)
        except ValueError:
            self.detach_stack(name)
            raise
        self._select(None)

    def projection(self, stack: str, module_name: str) -> BrainstacksLayer:
        """The wrapped projection that a stack covers. Raises ValueError if the model has none of that name."""
        try:
            return self._wrapped(module_name)
        except AttributeError as error:
            raise ValueError(f"Stack {stack}: the base model has no module {module_name}") from error

    def detach_stack(self, name: str) -> None:
        """Remove a frozen stack, and switch all others on."""
        for layer in self.layers():
            layer.bank.remove(name)
        self._stacks = [stack for stack in self.stacks if stack.name != name]
        if self.resident is not None:
            self.resident.forget(name)
        self._select(None)

    def use_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> None:
        """Switch on exactly the frozen stacks `names` (None: all); the trainable stack is not touched.

        Args:
            weights: (rows, len(names)) factor of each stack's output for each row of the batch, None for 1; one row
                serves any batch. A stack of weight 0 in every row is off: it costs nothing.

        Raises:
            ValueError: if a name is not attached, or `weights` has another shape.
        """
        self._select(names, weights)
        self._mode = "chosen"

    def _select(self, names: Sequence[str] | None, weights: Tensor | None = None) -> None:
        known = [stack.name for stack in self.stacks]
        names = known if names is None else list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"No such stack: {', '.join(unknown)}; attached are {', '.join(known) or 'none'}")
        if weights is not None:
            if weights.dim() != 2 or weights.shape[1] != len(names):
                raise ValueError(
                    f"`weights` has shape {tuple(weights.shape)}; {len(names)} stacks need (rows, {len(names)})"
                )
            used = weights.ne(0).any(0).tolist()
            names, weights = [name for name, use in zip(names, used, strict=True) if use], weights[:, used]
        if self.resident is not None:
            self.resident.ensure(names)
        for layer in self.layers():
            layer.bank.select(names, weights)
        self._on, self._pending = (names, weights), False

    @contextmanager
    def using_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> Iterator[None]:
        """`use_stacks` for a while; afterwards the stacks that were on before are on again, with their weights."""
        before = self._on, self._mode
        self.use_stacks(names, weights)
        try:
            yield
        finally:
            self._return_to(*before)

    def _return_to(self, on: tuple[list[str], Tensor | None], mode: str) -> None:
        """With a library behind the model this must read nothing from disk: perhaps no forward will need it."""
        if self.resident is None:
            self._select(*on)
        else:
            self._on, self._pending = on, True
        self._mode = mode

    def _switch_on_pending(self, *_: Any) -> None:
        if self._pending:
            self._select(*self._on)

    # Answers; see inference.py

    @property
    def mode(self) -> str:
        """Which stacks are on when no one has chosen.

        auto: `generate` routes every prompt if the library has a router; a plain forward has all stacks on.
        routed: both route. ungated: all stacks on in both. base: none.
        Reads "chosen" after `use_stacks`. The environment variable BRAINSTACKS_MODE is what a loaded library starts with.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode (or BRAINSTACKS_MODE) is {mode!r}; it must be one of {', '.join(MODES)}")
        self._return_to(([] if mode == "base" else [stack.name for stack in self._stacks], None), mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self._batch.look_at(kwargs.get("attention_mask"))
        if self._mode != "routed":
            return super().forward(*args, **kwargs)
        from axolotl_brainstacks import inference

        return inference.routed_forward(self, *args, **kwargs)

    def generate(self, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, each row of the batch with the stacks of its own route.

        Args:
            domains: weights of domains instead of the router's, for all rows or one mapping a row; {} is the base model.

        Raises:
            ValueError: if `domains` names a domain without stacks, or the router does not belong to the library.
        """
        from axolotl_brainstacks import inference

        return inference.generate(self, *args, domains=domains, **kwargs)

    def route(
        self, prompts: Tensor | Sequence[str], attention_mask: Tensor | None = None, tokenizer: Any = None
    ) -> list[PromptRoute]:
        """The router's choice for each prompt: token ids (rows, tokens), or texts and their tokenizer."""
        from axolotl_brainstacks import inference

        return inference.route(self, prompts, attention_mask, tokenizer)

    @contextmanager
    def routed(
        self,
        prompts: Tensor | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        domains: Domains | None = None,
    ) -> Iterator[list[PromptRoute]]:
        """Hold the routes of these prompts, or those of `domains`, for every forward inside: one a row, or one for all."""
        from axolotl_brainstacks import inference

        routes = inference.routes_for(self, prompts, attention_mask, tokenizer, domains)
        with self.using_stacks(*inference.stack_weights(self, routes)):
            yield routes

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PeftModel's, for callers that have only the tuner: the trainable stack is off for a while."""
        before = {layer: layer.disable_adapters for layer in self.layers()}
        try:
            for layer in before:
                layer._disable_adapters = True
            yield
        finally:
            for layer, disabled in before.items():
                layer._disable_adapters = disabled

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
        layers = [layer for layer in self.layers() if adapter_name in layer.shapes]
        return stack_tensors({layer.module_name: layer.export_stack(adapter_name) for layer in layers})

    def set_null_space(self, adapter_name: str, bases: Mapping[str, Tensor]) -> None:
        """Keep the trainable stack off the columns of `bases`: module name -> (out, d). Others are unconstrained."""
        for layer in self.layers():
            if adapter_name in layer.shapes:
                basis, (a, b) = bases.get(layer.module_name), layer.trained(adapter_name)
                b.basis = None if basis is None else basis.to(a.weight.device, torch.float32)


def attach_library(tuner: BrainstacksModel, library: Library, model_name: str) -> None:
    """Attach all stacks of `library`, oldest first, those of a domain that is being trained again among them.

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
