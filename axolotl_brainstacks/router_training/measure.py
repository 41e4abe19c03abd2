"""Measures many losses at once: each row of a batch is an example with domain weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.distributed import over_ranks, world_size
from axolotl_brainstacks.evaluation import Batch, Example, batch_losses, evaluating
from axolotl_brainstacks.router.features import base_features, pad_right
from axolotl_brainstacks.router.router import Stack, spread


@dataclass
class LossMeter:
    """Measures losses of examples under domain weights, and the router's features of prompts.

    Attributes:
        model: the model with its library.
        tuner: of the model.
        domains: that have weights, in the router's order.
        stacks: the library's stacks, in its order.
        batch_size: rows per forward.
        forwards: number of batches so far, summed over all processes.
    """

    model: PeftModel
    tuner: StackTuner
    domains: list[str]
    stacks: Sequence[Stack]
    batch_size: int
    forwards: int = field(default=0, init=False)

    def losses(
        self, rows: Sequence[Example], weights: Tensor, progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """Measure each example under its own domain weights. Every process must call this.

        Args:
            rows: examples; one may occur several times, with different weights.
            weights: (len(rows), domains).
            progress: called after each batch with the approximate number of losses that all processes have measured in it.

        Returns:
            The mean loss per answer token of each example, in nats.
        """
        # A batch computes every stack that one of its rows needs, so examples with the same set of domains come together. Among
        # them the order is that of length, for little padding.
        order = sorted(range(len(rows)), key=lambda i: ((weights[i] != 0).tolist(), len(rows[i].input_ids), i))

        def compute(batch: list[int]) -> list[float]:
            losses = self._batch_losses(rows, weights, batch)
            if progress:
                progress(len(batch) * world_size())
            return losses

        with evaluating(self.model), self.model.disable_adapter():
            return self._in_batches(order, compute)

    def _in_batches[R](self, order: list[int], compute: Callable[[list[int]], list[R]]) -> list[R]:
        """Call `compute` with batches of indices that are adjacent in `order`; return the results in the order of the indices."""
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        self.forwards += len(batches)
        results = [result for part in over_ranks(batches, compute) for result in part]
        found = dict(zip(order, results, strict=True))
        return [found[i] for i in range(len(order))]

    def _batch_losses(self, rows: Sequence[Example], weights: Tensor, batch: list[int]) -> list[float]:
        names, factors = spread(weights[batch], self.domains, self.stacks)
        device = next(self.model.parameters()).device
        with self.tuner.using_stacks(names, factors.to(device)):
            losses = batch_losses(self.model, Batch.of([rows[i] for i in batch], device))
        return [total / tokens for total, tokens in losses]

    def features(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Tensor]:
        """The router's features of each prompt, as `base_features` computes them. Every process must call this.

        Args:
            prompts: token ids of each.
            max_tokens: most tokens to read of a prompt, counted from its end.

        Returns:
            (at most max_tokens, features) for each prompt, fp32, on the CPU.
        """
        device = next(self.model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))

        def compute(batch: list[int]) -> list[Tensor]:
            ids, mask = pad_right([torch.tensor(prompts[i], device=device) for i in batch])
            hidden, kept = base_features(self.model, self.tuner, ids, mask, max_tokens)
            return [row[real].cpu() for row, real in zip(hidden, kept, strict=True)]

        return self._in_batches(order, compute)
