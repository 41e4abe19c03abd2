"""One wrapped projection: the base layer, the bank of frozen stacks, and the stack in training."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from axolotl_brainstacks.adapter.bank import StackBank, StackShape
from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.gating import add_loss, balance_loss, expert_use, noisy_logits, top_k_gates
from axolotl_brainstacks.distributed import gathered
from axolotl_brainstacks.nullspace import project_out


class OutputProjection(nn.Linear):
    """The B matrices of a stack, (out, experts * r), kept off the columns of `basis` (out, d) when there is one."""

    basis: Tensor | None

    def __init__(self, ranks: int, out_features: int) -> None:
        super().__init__(ranks, out_features, bias=False)
        self.register_buffer("basis", None, persistent=False)

    def effective_weight(self) -> Tensor:
        """What is multiplied, and what is frozen at the end: the same in training, evaluation and inference."""
        return self.weight if self.basis is None else project_out(self.weight, self.basis.to(self.weight.dtype))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.effective_weight())


class BrainstacksLayer(nn.Module, BaseTunerLayer):
    """``y = W x + sum_frozen delta(x) + delta_active(x)`` over any linear module (paper section 1).

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
        if in_features is None or out_features is None:
            raise ValueError(f"Brainstacks cannot wrap {module_name}: {type(base_layer).__name__} is no linear layer")
        self.in_features, self.out_features = in_features, out_features
        self.brainstacks_A = nn.ModuleDict()
        self.brainstacks_B = nn.ModuleDict()
        self.dropouts = nn.ModuleDict()
        self.shapes: dict[str, StackShape] = {}
        self.configs: dict[str, BrainstacksConfig] = {}
        self.bank = StackBank()
        # A micro-batch's share in the optimiser step: the trainer's loss is divided likewise.
        self.balance_scale = 1.0
        # Sums over training forwards: expert use (experts), balance loss, number of forwards.
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
        self.reset_stack(adapter_name, torch.initial_seed())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_stack(self, adapter_name: str, seed: int) -> None:
        """A Kaiming-uniform, W_r ~ N(0, 0.02^2), W_n and B zero; a function of seed and module name alone, on every rank."""
        shape = self.shapes[adapter_name]
        a, b = self.brainstacks_A[adapter_name].weight, self.brainstacks_B[adapter_name].weight
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
        """CPU copies of A and of the B that acts, i.e. folded into the null space's complement."""
        a, b = self.brainstacks_A[adapter_name].weight, self.brainstacks_B[adapter_name]
        with gathered([a, b.weight]):
            return a.detach().cpu().clone(), b.effective_weight().detach().cpu().clone()

    @torch.no_grad()
    def attach(self, name: str, config: BrainstacksConfig, a: Tensor, b: Tensor) -> None:
        """Add a frozen stack from `a` and `b` as they are on disk, in the base layer's compute dtype and on its device.

        Raises:
            ValueError: if a shape does not fit this projection.
        """
        n, r = config.num_experts, b.shape[1] // config.num_experts
        if tuple(a.shape) != (2 * n + n * r, self.in_features) or tuple(b.shape) != (self.out_features, n * r):
            raise ValueError(
                f"Stack {name}: tensors of {self.module_name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do "
                f"not fit a projection {self.in_features} -> {self.out_features} with {n} experts"
            )
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            dtype = torch.float16 if dtype is torch.int8 else torch.float32
        inputs = torch.cat([a[:n], a[2 * n :]]).to(device, dtype)
        self.bank.append(
            name, StackShape(r, n, config.top_k, config.scaling), inputs, b.T.contiguous().to(device, dtype)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "adapter_names" in kwargs:
            raise ValueError("Brainstacks routes by stack weights, not by `adapter_names`; see `use_stacks` and `route`")
        y = self.base_layer(x, *args, **kwargs)
        if self.bank.active:
            y = y + self.bank(x).to(y.dtype)
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.shapes:
                    y = y + self.active_delta(name, x).to(y.dtype)
        return y

    def active_delta(self, name: str, x: Tensor) -> Tensor:
        """Output of the trainable stack `name`: (..., in) -> (..., out). Injects the load-balance gradient in training."""
        shape, n = self.shapes[name], self.shapes[name].num_experts
        a = self.brainstacks_A[name]
        h = a(self._cast_input_dtype(self.dropouts[name](x), a.weight.dtype))
        logits = h[..., :n].float()
        if self.training and self.configs[name].noisy_gate:
            logits = noisy_logits(logits, h[..., n : 2 * n].float())
        gates = top_k_gates(logits, shape.top_k)
        if self.training and self.configs[name].balance_coef:
            use = expert_use(gates, shape.top_k)
            loss = balance_loss(logits, use)
            gates = add_loss(gates, loss, self.configs[name].balance_coef * self.balance_scale)
            self._count(use, loss)
        z = h[..., 2 * n :].unflatten(-1, (n, shape.r)) * (gates * shape.scaling).to(h.dtype).unsqueeze(-1)
        return self.brainstacks_B[name](z.flatten(-2))

    def _count(self, use: Tensor, loss: Tensor) -> None:
        row = torch.cat([use, loss.detach().float().view(1), use.new_ones(1)])
        self.statistics = row if self.statistics is None else self.statistics + row

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("A stack's gates depend on the token, so stacks cannot be merged into the base weights")

    def unmerge(self) -> None:
        raise ValueError("Stacks cannot be merged into the base weights, so there is nothing to unmerge")
