"""One wrapped projection: the base layer, the bank of frozen stacks, and the stacks in training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from axolotl_brainstacks.adapter.bank import StackBank
from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import BatchTokens, Gating, gated, multiply_add
from axolotl_brainstacks.adapter.nullspace import project_out
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.adapter.segment import StackShape, StackTensors
from axolotl_brainstacks.distributed import gather_full, gathered


class OutputProjection(nn.Linear):
    """The B matrices of a stack in training, (out, experts * r).

    Attributes:
        basis: (out, d), orthonormal columns that the stack's output has no component along; None: unconstrained.
    """

    basis: Tensor | None

    def __init__(self, ranks: int, out_features: int) -> None:
        super().__init__(ranks, out_features, bias=False)
        self.register_buffer("basis", None, persistent=False)

    def effective_weight(self) -> Tensor:
        """The matrix (out, experts * r) that acts in training and evaluation, and that is frozen afterwards."""
        return self.weight if self.basis is None else project_out(self.weight, self.basis)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Add the stack's output to `y` (..., out), for rank-space activations `z` (..., experts * r)."""
        return multiply_add(y, z, self.effective_weight().to(z.dtype).T)


class BrainstacksLinear(nn.Module, BaseTunerLayer):
    """``y = W x + sum_frozen delta(x) + delta_active(x)`` for any linear module (arXiv 2604.01152, MoE-LoRA building block).

    Attributes:
        module_name: name of the wrapped module in the base model.
        brainstacks_A: by adapter, (2 * experts + experts * r, in), rows: gate W_r, noise W_n, the experts' A. They are one
            matrix so that one matmul reads x once.
        brainstacks_B: by adapter, (out, experts * r), columns in the experts' order.
        bank: the frozen stacks.
        frozen_dtype: dtype of the frozen stacks; None for the base layer's compute dtype.
        batch: state of the current batch, shared by all layers of the model.
        balance_scale: a micro-batch's share of the optimiser step. The trainer divides its loss likewise, but it does not see
            the load-balance loss.
        statistics: (experts + 2,), sums over training forwards: share of each expert, balance loss, number of forwards. Reset
            it with `zero_`: a compiled, checkpointed layer may add to a tensor but not set an attribute.
    """

    adapter_layer_names: tuple[str, ...] = ("brainstacks_A", "brainstacks_B")
    other_param_names: tuple[str, ...] = ("shapes", "dropouts", "configs")

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        in_features, out_features = _get_in_out_features(base_layer)
        no_linear = isinstance(base_layer, nn.Embedding | nn.modules.conv._ConvNd | nn.MultiheadAttention)
        if in_features is None or out_features is None or no_linear:
            raise ValueError(f"Brainstacks cannot wrap {module_name}: {type(base_layer).__name__} is no linear layer")
        self.in_features, self.out_features = in_features, out_features
        self.brainstacks_A = nn.ModuleDict()
        self.brainstacks_B = nn.ModuleDict()
        self.dropouts = nn.ModuleDict()
        self.shapes: dict[str, StackShape] = {}
        self.configs: dict[str, BrainstacksConfig] = {}
        self.bank = StackBank()
        self.frozen_dtype: torch.dtype | None = None
        self.batch = BatchTokens()
        self.cast_input_dtype_enabled = True  # see peft.helpers.disable_input_dtype_casting
        self.balance_scale = 1.0
        self.statistics: Tensor | None = None

    def update_layer(self, adapter_name: str, config: BrainstacksConfig) -> None:
        """Add a trainable stack with fresh weights. Its B is zero, so it changes no output until it is trained."""
        experts, ranks = config.num_experts, config.num_experts * config.r
        self.configs[adapter_name] = config
        self.shapes[adapter_name] = StackShape(config.r, experts, config.top_k, config.scaling)
        self.dropouts[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.brainstacks_A[adapter_name] = nn.Linear(self.in_features, 2 * experts + ranks, bias=False)
        self.brainstacks_B[adapter_name] = OutputProjection(ranks, self.out_features)
        self.statistics = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # The seed comes from the global generator, so that two adapters of a process start differently and
        # `torch.manual_seed` makes them reproducible, as for PEFT's own adapters.
        self.reset_stack(adapter_name, int(torch.randint(2**62, (), device="cpu")))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trained(self, adapter_name: str) -> tuple[nn.Linear, OutputProjection]:
        """The modules that hold a trainable stack's A and B."""
        a, b = self.brainstacks_A[adapter_name], self.brainstacks_B[adapter_name]
        assert isinstance(a, nn.Linear) and isinstance(b, OutputProjection)
        return a, b

    @torch.no_grad()
    def reset_stack(self, adapter_name: str, seed: int) -> None:
        """Give a trainable stack fresh weights: A Kaiming-uniform, W_r ~ N(0, 0.02^2), W_n and B zero.

        The weights depend on the seed and the module's name only, so all ranks get the same ones.

        Args:
            adapter_name: of the stack.
            seed: any integer.
        """
        shape = self.shapes[adapter_name]
        a, b = (side.weight for side in self.trained(adapter_name))
        if a.is_meta:
            return
        digest = hashlib.sha256(f"{seed}.{self.module_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        n = shape.num_experts
        rows = torch.empty(2 * n + n * shape.r, self.in_features)
        nn.init.normal_(rows[:n], std=0.02, generator=generator)  # W_r
        nn.init.zeros_(rows[n : 2 * n])  # W_n
        nn.init.kaiming_uniform_(rows[2 * n :], a=math.sqrt(5), generator=generator)  # A, as LoRA initialises it
        with gathered([a, b], write=True):
            a.copy_(rows)
            b.zero_()

    @torch.no_grad()
    def export_stack(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and the effective B of a trainable stack, on the CPU in fp32. Every rank must call this.

        Returns:
            A (2 * experts + experts * r, in), and B (out, experts * r) without components along the null space's basis.
        """
        a_side, b_side = self.trained(adapter_name)
        a, b = gather_full(a_side.weight), gather_full(b_side.weight)
        if b_side.basis is not None:
            # V is orthonormal to fp32 only, so one projection leaves a rest along V, which matters when little of B remains.
            # The second projection, in float64, removes that rest.
            basis = b_side.basis.cpu().double()
            b = project_out(project_out(b.double(), basis), basis)
        return a.float(), b.float()

    def stack_shape(self, name: str, config: BrainstacksConfig, a: Tensor, b: Tensor) -> StackShape:
        """The shape of a stack of this projection.

        Args:
            name: of the stack, for errors.
            config: of the stack.
            a: (2 * experts + experts * r, in).
            b: (out, experts * r).

        Raises:
            ValueError: if the tensors have other shapes than the config and this projection require.
        """
        n, r = config.num_experts, config.r
        if tuple(a.shape) != (2 * n + n * r, self.in_features) or tuple(b.shape) != (self.out_features, n * r):
            raise ValueError(
                f"Stack {name}: tensors of {self.module_name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do "
                f"not fit a projection {self.in_features} -> {self.out_features} with {n} experts of rank {r}"
            )
        return StackShape(r, n, config.top_k, config.scaling)

    def attach(self, name: str, config: BrainstacksConfig, a: Tensor, b: Tensor) -> None:
        """Add a frozen stack after all others. Arguments and errors are those of `stack_shape`."""
        shape = self.stack_shape(name, config, a, b)
        segment, place = self.bank.next_place(shape)
        self.update_bank((), [StackTensors(name, shape, a, b, segment, place)])

    # Autograd could not use a tensor that was created in inference mode, and only inference mode could change it in place.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update_bank(self, remove: Collection[str], add: Sequence[StackTensors]) -> None:
        """Remove frozen stacks and add others.

        New stacks are kept in `frozen_dtype`, or else the base layer's compute dtype, on the base layer's device or, if
        offloaded, on the CPU.

        Args:
            remove: names; those that the bank does not hold are ignored.
            add: stacks that fit this projection.
        """
        device, dtype = self._bank_device_and_dtype()
        if self.bank.offload is not None:
            device = torch.device("cpu")
        self.bank.change(remove, add, device, dtype)

    def offload_frozen(self, offload: Offload) -> None:
        """Keep frozen stacks that are added from now on in CPU memory. The bank must be empty."""
        offload.join(self.bank, self.module_name)
        self.bank.offload = offload

    def bank_bytes(self, shape: StackShape) -> int:
        """Memory that a stack of this shape takes in the bank, in bytes."""
        ranks = shape.num_experts * shape.r
        elements = (shape.num_experts + ranks) * self.in_features + ranks * self.out_features
        return elements * self.bank_dtype.itemsize

    @property
    def bank_dtype(self) -> torch.dtype:
        """The dtype that frozen stacks are kept in."""
        return self._bank_device_and_dtype()[1]

    def _bank_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype]:
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if self.frozen_dtype is not None:
            return device, self.frozen_dtype
        if dtype is None or not dtype.is_floating_point:
            # A quantised base layer stores integers. The int8 layers of bitsandbytes compute in fp16.
            dtype = torch.float16 if dtype is torch.int8 else torch.float32
        return device, dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.bank.active:
            y = self.bank.add_deltas(x, y)
        if not (self.disable_adapters or self.batch.frozen_only):
            for name in self.active_adapters:
                if name in self.shapes:
                    y = self.add_trained(name, x, y)
        return y

    def add_trained(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the output of the trainable stack `name`.

        Args:
            name: of the adapter.
            x: (..., in), the projection's input.
            y: (..., out), the output so far.

        Returns:
            (..., out), in the dtype of `y`.
        """
        shape, config = self.shapes[name], self.configs[name]
        a, b = self.trained(name)
        h = a(self._cast_input_dtype(self.dropouts[name](x), a.weight.dtype))  # (..., 2 * experts + experts * r)
        # A forward without gradient must not count: DPO's reference pass is no training, and reentrant checkpointing repeats
        # each forward with gradient. A base model's own expert that gets no token has nothing to count.
        counting = self.training and config.balance_coef and torch.is_grad_enabled() and x.numel() > 0
        gating = Gating(
            shape.num_experts,
            shape.r,
            shape.top_k,
            shape.scaling,
            noise_rows=True,
            noisy=self.training and config.noisy_gate,
            balance=config.balance_coef * self.balance_scale if counting else None,
        )
        share = self.batch.share_of(x) if counting else None
        z, counts = gated(h.unsqueeze(-2), gating, share=share)  # one stack: (..., 1, features)
        if counting:
            self._count(counts.float())
        return b(z, y)

    def _count(self, counts: Tensor) -> None:
        if self.statistics is None:
            self.statistics = torch.zeros_like(counts)
        self.statistics.add_(counts)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError, always."""
        raise ValueError("A stack's gates depend on the token, so stacks cannot be merged into the base weights")

    def unmerge(self) -> None:
        """Raises ValueError, always."""
        raise ValueError("Stacks cannot be merged into the base weights, so there is nothing to unmerge")
