"""What stacks are compared with besides PEFT's LoRA: a plain loop over stacks and experts, and Axolotl's MixLoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import EXPERTS, PROJECTIONS, RANK, TOP_K, another, with_lora
from torch import Tensor, nn
from transformers import PreTrainedModel


class LoopStack(nn.Module):
    """One MoE-LoRA stack as the paper's formulas read: every expert's output, weighted and added."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_features, EXPERTS, bias=False)
        self.noise = nn.Linear(in_features, EXPERTS, bias=False)
        self.a = nn.ModuleList(nn.Linear(in_features, RANK, bias=False) for _ in range(EXPERTS))
        self.b = nn.ModuleList(nn.Linear(RANK, out_features, bias=False) for _ in range(EXPERTS))
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.noise.weight)
        for b in self.b:
            nn.init.normal_(b.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x).float()
        if self.training and self.gate.weight.requires_grad:
            logits = logits + F.softplus(self.noise(x).float()) * torch.randn_like(logits)
        values, chosen = logits.topk(TOP_K, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1)).to(x.dtype)
        experts = torch.stack([b(a(x)) for a, b in zip(self.a, self.b, strict=True)], dim=-2)
        return (experts * gates.unsqueeze(-1)).sum(-2) * RANK**0.5


class LoopLinear(nn.Module):
    """A projection with a loop over its stacks; the last one is trained."""

    def __init__(self, base: nn.Linear, frozen: int) -> None:
        super().__init__()
        self.base = base
        self.stacks = nn.ModuleList(LoopStack(base.in_features, base.out_features) for _ in range(frozen + 1))
        self.stacks.to(base.weight.device)
        self.stacks[:-1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for stack in self.stacks:
            y = y + stack(x).to(y.dtype)
        return y


def with_loops(base: PreTrainedModel, frozen: int = 0) -> PreTrainedModel:
    """The same stacks as `models.with_stacks`, computed one expert after another."""
    model = another(base)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS:
                assert isinstance(child, nn.Linear)
                setattr(module, name, LoopLinear(child, frozen))
    return model


def with_mixlora(base: PreTrainedModel) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Axolotl's MixLoRA and its load-balance loss.

    It makes experts of the feed-forward block only (three of seven projections, one gate for the three), with a plain LoRA
    on attention's projections.
    """
    from axolotl.integrations.mixlora.loss import collect_mixlora_aux_loss
    from axolotl.integrations.mixlora.patching import patch_model_with_mixlora
    from axolotl.utils.dict import DictDefault

    model = with_lora(base, PROJECTIONS[:4])
    settings = {
        "mixlora_num_experts": EXPERTS,
        "mixlora_top_k": TOP_K,
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
    }
    patch_model_with_mixlora(model, DictDefault(settings))
    return model, lambda: collect_mixlora_aux_loss(model)
