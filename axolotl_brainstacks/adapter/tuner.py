"""The PEFT tuner: it wraps projections, attaches frozen stacks, and switches them on and off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import BatchTokens
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.selection import FrozenStack, ModelLock, Selection, SelectionState
from axolotl_brainstacks.adapter.tensors import check_values, is_stack_key, stack_pairs, stack_tensors
from axolotl_brainstacks.names import FrozenDtype

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class StackTuner(BaseTuner):
    """MoE-LoRA stacks on a frozen base model (arXiv 2604.01152, MoE-LoRA building block).

    The stack in training is a PEFT adapter. Frozen stacks are buffers of the layers and no adapters in PEFT's sense: they are
    never trained, never in a checkpoint, and stay on when PEFT disables adapters.

    Threads: forwards, `using_stacks`, `use_stacks`, `disable_adapter`, `attach_stack` and `detach_stack` take the model's
    `lock`, so threads compute one after the other, each with the stacks that it chose. A block of `with using_stacks(...)`
    holds the lock and other threads wait until it ends, so the block must not wait for another thread's answer. A selection
    that `use_stacks` makes holds for all threads. The lock does not guard calls of the base model inside
    (`get_base_model()`), training, moving to another device, and copying.

    Interrupts: whenever an exception arrives, the next forward uses the stacks that were chosen before.

    Attributes:
        lock: guards the selection, and with it the forwards.
        selection: the attached stacks and those that are on.
    """

    prefix: str = "brainstacks_"
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
        self.lock = ModelLock()
        self.selection = SelectionState()
        self._batch = BatchTokens()
        self._offload: Offload | None = None
        self._frozen_dtype: torch.dtype | None = None
        self._settling: RemovableHandle | None = None

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

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        if self._settling is not None:
            self._settling.remove()  # the hook would keep this tuner alive and run in every forward of the base model
        return base

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

    # Frozen stacks

    def brainstacks_layers(self) -> Iterator[BrainstacksLinear]:
        """All wrapped projections, in the order of the model's modules."""
        return (module for module in self.model.modules() if isinstance(module, BrainstacksLinear))

    @property
    def stacks(self) -> list[FrozenStack]:
        """The attached frozen stacks, oldest first."""
        return list(self.selection.stacks)

    def offload_frozen(self) -> None:
        """Keep frozen stacks in CPU memory, and copy those of a decoder layer to the GPU while the layer before it computes.

        Raises:
            ValueError: if a stack is in memory already.
        """
        self._check_none_is_held("offload_frozen")
        self._offload = Offload()
        for layer in self.brainstacks_layers():
            layer.offload_frozen(self._offload)

    def set_frozen_dtype(self, dtype: FrozenDtype) -> None:
        """Set the dtype of frozen stacks. A library that is loaded sets the one of its manifest.

        Args:
            dtype: name of a torch dtype; None for the base model's compute dtype.

        Raises:
            ValueError: if a stack is in memory already.
        """
        self._check_none_is_held("set_frozen_dtype")
        self._frozen_dtype = None if dtype is None else getattr(torch, dtype)
        for layer in self.brainstacks_layers():
            layer.frozen_dtype = self._frozen_dtype

    def _check_none_is_held(self, method: str) -> None:
        if any(layer.bank.names for layer in self.brainstacks_layers()):
            raise ValueError(
                f"Call `{method}` before any stack is in memory: before the first forward or attached stack"
            )

    def attach_stack(self, name: str, domain: str, config: BrainstacksConfig, tensors: Mapping[str, Tensor]) -> None:
        """Add a frozen stack, and switch all attached stacks on.

        Args:
            name: of the stack.
            domain: that the stack belongs to.
            config: of the stack.
            tensors: the tensors of its PEFT folder.

        Raises:
            ValueError: if a stack of this name is attached, or the tensors are unknown, incomplete, not finite or do not fit
                the model. The model is then as before.
        """
        with self.lock:
            if name in [stack.name for stack in self.stacks]:
                raise ValueError(f"Stack {name} is attached already")
            pairs = stack_pairs(name, tensors)
            check_values(f"Stack {name}", tensors, self._frozen_dtype)
            self._settle_before_forwards()
            self._before_attaching()
            self._take_out(name)  # a call that was interrupted may have left a part of this stack
            try:
                for module_name, (a, b) in pairs.items():
                    self.projection_of(name, module_name).attach(name, config, a, b)
            except BaseException:
                self._take_out(name)
                raise
            self._now_attached((*self.stacks, FrozenStack(name, domain)))

    def projection_of(self, stack: str, module_name: str) -> BrainstacksLinear:
        """The wrapped projection `module_name` for the stack `stack`.

        Raises:
            ValueError: if the model has no such module, or it cannot be wrapped.
        """
        try:
            return self._wrapped(module_name)
        except AttributeError as error:
            raise ValueError(f"Stack {stack}: the base model has no module {module_name!r}") from error

    def detach_stack(self, name: str) -> None:
        """Remove a frozen stack, and switch all others on."""
        with self.lock:
            self._now_attached(tuple(stack for stack in self.stacks if stack.name != name))
            self._take_out(name)
            self._settle()

    def _now_attached(self, stacks: tuple[FrozenStack, ...]) -> None:
        """Record the attached stacks, and switch all of them on."""
        on = Selection(tuple(stack.name for stack in stacks), mode=self.selection.wanted.mode)
        # One statement, so that a signal handler cannot run between the two assignments.
        self.selection.stacks, self.selection.wanted = stacks, on
        self._settle()

    def _take_out(self, name: str) -> None:
        """Remove a stack from the layers' banks."""
        # First, so that an interrupt below leaves the selection unsettled and the next forward switches all layers.
        self.selection.applied = None
        for layer in self.brainstacks_layers():
            layer.bank.remove(name)

    def use_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> None:
        """Switch on exactly the frozen stacks `names`, for all threads. The trainable stack stays as it is.

        Args:
            names: of attached stacks; None for all.
            weights: (rows, len(names)), factor of each stack's output for each row of the batch; None for 1 everywhere. A
                single row serves a batch of any size. A stack of weight 0 in every row is off and costs nothing.

        Raises:
            ValueError: if a name is not attached, `weights` has another shape or is not finite, or a stack cannot be read.
        """
        with self.lock:
            selection = self._selection(names, weights, "chosen")
            self._switch_to(selection)
            self.selection.wanted = selection

    def _selection(
        self, names: Sequence[str] | None, weights: Tensor | None = None, mode: str | None = None
    ) -> Selection:
        """The selection for `use_stacks`, without the stacks that have weight 0 in every row. Raises ValueError as it does."""
        known = [stack.name for stack in self.stacks]
        names = known if names is None else list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"No such stack: {', '.join(unknown)}; attached are {', '.join(known) or 'none'}")
        if weights is not None:
            if weights.dim() != 2 or weights.shape[1] != len(names):
                raise ValueError(
                    f"`weights` has shape {tuple(weights.shape)}; {len(names)} stacks need (rows, {len(names)})"
                )
            if not weights.isfinite().all():
                raise ValueError(f"`weights` for {', '.join(names)} are not finite; a row would spoil all others")
            used = weights.ne(0).any(0).tolist()
            names = [name for name, use in zip(names, used, strict=True) if use]
            weights = weights[:, used]
        return Selection(tuple(names), weights, mode or self.selection.wanted.mode)

    def _switch_to(self, selection: Selection) -> None:
        """Set all layers to `selection`, after its stacks have been read into memory."""
        # None while the layers change: after an interrupt they may differ from each other.
        self.selection.applied = None
        self._bring_into_memory(selection.names)
        for layer in self.brainstacks_layers():
            layer.bank.select(selection.names, selection.weights)
        self.selection.applied = selection

    def _settle(self, *_: Any) -> None:
        """Set the layers to the wanted selection, unless they have it. This may read stacks from disk.

        As a forward pre-hook, it ignores its arguments.
        """
        if not self.selection.settled:
            with self.lock:
                self._switch_to(self.selection.wanted)

    def _settle_before_forwards(self) -> None:
        """Make every forward begin with `_settle`."""
        if self._settling is None:
            # The hook is on the decoder, because `generate` calls the base model and not this tuner.
            decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model
            self._settling = decoder.register_forward_pre_hook(self._settle)

    @contextmanager
    def using_stacks(self, names: Sequence[str] | None, weights: Tensor | None = None) -> Iterator[None]:
        """`use_stacks` for the length of a `with` block. Afterwards the previous selection holds again, with its weights.

        Forwards of other threads wait until the block ends.
        """
        with self.lock:
            before = self.selection.wanted
            try:
                self.use_stacks(names, weights)
                yield
            finally:
                self.selection.wanted = before
            self._settle_if_free()

    # Hooks for a subclass whose stacks lie on disk

    def _bring_into_memory(self, names: Sequence[str]) -> None:
        """Load the stacks `names` into the layers' banks. Called before they are switched on."""

    def _before_attaching(self) -> None:
        """Called before a stack is attached on top of the others."""

    def _settle_if_free(self) -> None:
        """Set the layers to the wanted selection now. A subclass may leave that to the next forward where it is expensive."""
        self._settle()

    # Forwards

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the stacks that are on; arguments and result are the base model's."""
        if torch.compiler.is_compiling():  # torch.compile cannot trace a lock
            return self._forward(*args, **kwargs)
        with self.lock:
            return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self._batch.set_mask(kwargs.get("attention_mask"))
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the trainable stack off for the length of a `with` block. Frozen stacks stay on.

        `PeftModel.disable_adapter` does the same; this is for callers that have only the tuner.
        """
        with self.lock:
            before = self._batch.frozen_only
            try:
                self._batch.frozen_only = True
                yield
            finally:
                self._batch.frozen_only = before

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
