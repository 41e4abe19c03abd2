"""The PEFT tuner: it attaches frozen stacks to the wrapped projections, and switches them on and off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.injection import ProjectionTuner
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.selection import FrozenStack, ModelLock, Selection, SelectionState
from axolotl_brainstacks.adapter.tensors import check_values, stack_pairs
from axolotl_brainstacks.names import FrozenDtype


class StackTuner(ProjectionTuner):
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

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.lock = ModelLock()
        self.selection = SelectionState()
        self._settling: RemovableHandle | None = None

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        if self._settling is not None:
            self._settling.remove()  # the hook would keep this tuner alive and run in every forward of the base model
        return base

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
