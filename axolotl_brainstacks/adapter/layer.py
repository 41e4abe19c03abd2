"""One wrapped projection: the base layer, the bank of frozen stacks, and the stack in training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from axolotl_brainstacks.adapter.bank import StackBank, StackShape, StackTensors
from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import BatchTokens, Gating, gated, multiply_add
from axolotl_brainstacks.adapter.nullspace import project_out
from axolotl_brainstacks.adapter.offload import Offload
from axolotl_brainstacks.distributed import gather_full, gathered


class OutputProjection(nn.Linear):
    """The B matrices of a stack, (out, experts * r), kept off the columns of `basis` (out, d) when there is one."""

    basis: Tensor | None

    def __init__(self, ranks: int, out_features: int) -> None:
        super().__init__(ranks, out_features, bias=False)
        self.register_buffer("basis", None, persistent=False)

    def effective_weight(self) -> Tensor:
        """What is multiplied, and what is frozen at the end: the same in training, evaluation and inference."""
        return self.weight if self.basis is None else project_out(self.weight, self.basis)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """`y` (..., out) plus the output for `z` (..., experts * r)."""
        return multiply_add(y, z, self.effective_weight().to(z.dtype).T)


class BrainstacksLinear(nn.Module, BaseTunerLayer):
    """``y = W x + sum_frozen delta(x) + delta_active(x)`` over any linear module (arXiv 2604.01152,
    MoE-LoRA building block).

    Weights of an adapter:
        brainstacks_A: (2 * experts + experts * r, in), rows: gate W_r, noise W_n, the experts' A. One matmul reads x once.
        brainstacks_B: (out, experts * r), columns in the experts' order.
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
        # A micro-batch's share in the optimiser step: the trainer's loss is divided likewise.
        self.balance_scale = 1.0
        # Sums over training forwards: expert use (experts), balance loss, number of forwards. To be reset with `zero_`:
        # a checkpointed layer that is compiled may add to a tensor, but not set an attribute.
        self.statistics: Tensor | None = None

    def update_layer(self, adapter_name: str, config: BrainstacksConfig) -> None:
        """Add a fresh stack, the identity until it is trained: B is zero."""
        experts, ranks = config.num_experts, config.num_experts * config.r
        self.configs[adapter_name] = config
        self.shapes[adapter_name] = StackShape(config.r, experts, config.top_k, config.scaling)
        self.dropouts[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.brainstacks_A[adapter_name] = nn.Linear(self.in_features, 2 * experts + ranks, bias=False)
        self.brainstacks_B[adapter_name] = OutputProjection(ranks, self.out_features)
        self.statistics = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # From the global generator: no two adapters of a process begin alike, and `torch.manual_seed` repeats them.
        self.reset_stack(adapter_name, int(torch.randint(2**62, (), device="cpu")))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def trained(self, adapter_name: str) -> tuple[nn.Linear, OutputProjection]:
        """The A and B sides of a trainable stack."""
        a, b = self.brainstacks_A[adapter_name], self.brainstacks_B[adapter_name]
        assert isinstance(a, nn.Linear) and isinstance(b, OutputProjection)
        return a, b

    @torch.no_grad()
    def reset_stack(self, adapter_name: str, seed: int) -> None:
        """A Kaiming-uniform, W_r ~ N(0, 0.02^2), W_n and B zero; a function of seed and module name alone, on every rank."""
        shape = self.shapes[adapter_name]
        a, b = (side.weight for side in self.trained(adapter_name))
        if a.is_meta:
            return
        digest = hashlib.sha256(f"{seed}.{self.module_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows = torch.empty(2 * shape.num_experts + shape.num_experts * shape.r, self.in_features)
        nn.init.normal_(rows[: shape.num_experts], std=0.02, generator=generator)
        nn.init.zeros_(rows[shape.num_experts : 2 * shape.num_experts])
        nn.init.kaiming_uniform_(rows[2 * shape.num_experts :], a=math.sqrt(5), generator=generator)
        with gathered([a, b], write=True):
            a.copy_(rows)
            b.zero_()

    @torch.no_grad()
    def export_stack(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """CPU copies of A and of the B that acts, in fp32.

        B is folded into the null space's complement in fp64, twice because V is orthonormal in fp32 only: nothing leaks,
        however little of B is left.
        """
        a_side, b_side = self.trained(adapter_name)
        a, b = gather_full(a_side.weight), gather_full(b_side.weight)
        if b_side.basis is not None:
            basis = b_side.basis.cpu().double()
            b = project_out(project_out(b.double(), basis), basis)
        return a.float(), b.float()

    def stack_shape(self, name: str, config: BrainstacksConfig, a: Tensor, b: Tensor) -> StackShape:
        """The shape of a stack with the tensors `a` and `b`.

        Raises:
            ValueError: if they do not fit this projection.
        """
        n, r = config.num_experts, config.r
        if tuple(a.shape) != (2 * n + n * r, self.in_features) or tuple(b.shape) != (self.out_features, n * r):
            raise ValueError(
                f"Stack {name}: tensors of {self.module_name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do "
                f"not fit a projection {self.in_features} -> {self.out_features} with {n} experts of rank {r}"
            )
        return StackShape(r, n, config.top_k, config.scaling)

    def attach(self, name: str, config: BrainstacksConfig, a: Tensor, b: Tensor) -> None:
        """Add a frozen stack after all others, from `a` and `b` as they are on disk. Raises as `stack_shape` does."""
        shape = self.stack_shape(name, config, a, b)
        segment, place = self.bank.next_place(shape)
        self.update_bank((), [StackTensors(name, shape, a, b, segment, place)])

    @torch.inference_mode(False)  # a tensor made in inference mode could not be trained through, nor be replaced, later
    @torch.no_grad()
    def update_bank(self, remove: Collection[str], add: Sequence[StackTensors]) -> None:
        """Take frozen stacks out and in; they are kept as `frozen_dtype` says, else in the base layer's compute dtype, on its
        device or offloaded."""
        device, dtype = self._bank_device_and_dtype()
        if self.bank.offload is not None:
            device = torch.device("cpu")
        self.bank.change(remove, add, device, dtype)

    def offload_frozen(self, offload: Offload) -> None:
        """Frozen stacks that come from here on stay in CPU memory."""
        offload.join(self.bank, self.module_name)
        self.bank.offload = offload

    def bank_bytes(self, shape: StackShape) -> int:
        """Memory that a stack takes in the bank."""
        ranks = shape.num_experts * shape.r
        numbers = (shape.num_experts + ranks) * self.in_features + ranks * self.out_features
        return numbers * self.bank_dtype.itemsize

    @property
    def bank_dtype(self) -> torch.dtype:
        """What frozen stacks are kept as."""
        return self._bank_device_and_dtype()[1]

    def _bank_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype]:
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if self.frozen_dtype is not None:
            return device, self.frozen_dtype
        if dtype is None or not dtype.is_floating_point:
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
        """`y` (..., out) plus the delta of the trainable stack `name` for `x` (..., in)."""
        shape, config = self.shapes[name], self.configs[name]
        a, b = self.trained(name)
        h = a(self._cast_input_dtype(self.dropouts[name](x), a.weight.dtype))
        # Not in the reference passes of DPO, nor in the first pass of reentrant checkpointing: no gradient, no count. Nor
        # without tokens, as in an expert of the base model that a batch does not use.
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
        z, counts = gated(h.unsqueeze(-2), gating, share=self.batch.share_of(x) if counting else None)
        if counting:
            self._count(counts.float())
        return b(z, y)

    def _count(self, counts: Tensor) -> None:
        if self.statistics is None:
            self.statistics = torch.zeros_like(counts)
        self.statistics.add_(counts)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("A stack's gates depend on the token, so stacks cannot be merged into the base weights")

    def unmerge(self) -> None:
        raise ValueError("Stacks cannot be merged into the base weights, so there is nothing to unmerge")
