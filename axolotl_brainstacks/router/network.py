"""The router's network: it maps a prompt's hidden states to one independent logit per domain."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.3, 3.0


class OutcomeRouter(nn.Module):
    """Token projection, attention pooling with a global query and one query per domain, and an MLP with GELU (arXiv 2604.01152,
    outcome router).

    All domains share the MLP's hidden layer. Each has its own output row, so that two domains that attend to the same tokens
    can still get different logits. The network has 2.2M parameters for 3,840 features and 5 domains.

    Args:
        features: width of the base model's hidden states.
        domains: number of domains.
        width: width of the projected tokens.
        dropout: on the MLP's input and hidden layer, in training only.
    """

    def __init__(self, features: int, domains: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)
        self.global_query = nn.Parameter(torch.randn(1, width))
        self.domain_queries = nn.Parameter(torch.randn(domains, width))
        self.hidden = nn.Linear(2 * width, width // 2)
        self.outputs = nn.Linear(width // 2, domains)
        self.dropout = nn.Dropout(dropout)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits (rows, domains), fp32.

        Args:
            hidden: (rows, tokens, features), any float dtype.
            mask: (rows, tokens), true at real tokens; every row needs at least one.
        """
        tokens = self.norm(self.project(hidden.to(self.project.weight.dtype)))  # (rows, tokens, width)
        queries = torch.cat([self.global_query, self.domain_queries])  # (1 + domains, width)
        scores = tokens @ queries.T / math.sqrt(tokens.shape[-1])  # (rows, tokens, 1 + domains)
        attention = scores.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).softmax(1)
        pooled = attention.transpose(1, 2) @ tokens  # (rows, 1 + domains, width)
        # Each domain sees the global vector and its own.
        own = pooled[:, 1:]
        seen = torch.cat([pooled[:, :1].expand_as(own), own], dim=-1)  # (rows, domains, 2 * width)
        inner = self.dropout(F.gelu(self.hidden(self.dropout(seen))))  # (rows, domains, width // 2)
        # Row d of the output layer acts on domain d's vector only, not on every domain's as `self.outputs(inner)` would.
        logits = (inner * self.outputs.weight).sum(-1) + self.outputs.bias  # (rows, domains)
        return logits.float() / self.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
