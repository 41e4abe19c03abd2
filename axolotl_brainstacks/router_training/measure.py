"""Losses of many (row, domain weights) pairs, each a row of a full batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.distributed import gather_objects, rank, world_size
from axolotl_brainstacks.evaluation import Batch, Example, batch_losses, evaluating
from axolotl_brainstacks.router.features import base_features, pad_right
from axolotl_brainstacks.router.router import Stack, spread


def over_ranks[T, R](items: Sequence[T], compute: Callable[[T], R]) -> list[R]:
    """`compute` of every item, shared out over the ranks; the results of all, in order, on every rank.

    Every rank computes equally often, because a sharded model's forward is a collective; surplus results are dropped.
    """
    own, ranks = rank(), world_size()
    mine: dict[int, R] = {}
    for turn in range(-(-len(items) // ranks)):
        number = turn * ranks + own
        result = compute(items[min(number, len(items) - 1)])
        if number < len(items):
            mine[number] = result
    everything = {number: result for part in gather_objects(mine) for number, result in part.items()}
    return [everything[number] for number in range(len(items))]


@dataclass
class LossMeter:
    """Measures rows under weights of domains.

    stacks: the library's stacks, in its order. batch_size: rows per forward. forwards: counted over all ranks.
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
        """Mean loss per answer token of each row under its domain weights (rows, domains), nats. Equal on every rank.

        Rows of one set of domains come together, so that a batch runs few stacks it does not need, then by length.
        `progress` is told how many losses all ranks have measured since it was told last.
        """
        order = sorted(range(len(rows)), key=lambda i: ((weights[i] != 0).tolist(), len(rows[i].input_ids), i))

        def compute(batch: list[int]) -> list[float]:
            losses = self._batch_losses(rows, weights, batch)
            if progress:
                progress(len(batch) * world_size())
            return losses

        with evaluating(self.model), self.model.disable_adapter():
            return self._in_batches(order, compute)

    def _in_batches[R](self, order: list[int], compute: Callable[[list[int]], list[R]]) -> list[R]:
        """`compute` of the items' numbers, in batches of neighbours in `order`; the results in the items' own order."""
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
        """Base features of each prompt's token ids, on the CPU: (at most max_tokens, features) each, fp32."""
        device = next(self.model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))

        def compute(batch: list[int]) -> list[Tensor]:
            ids, mask = pad_right([torch.tensor(prompts[i], device=device) for i in batch])
            hidden, kept = base_features(self.model, self.tuner, ids, mask, max_tokens)
            return [row[real].cpu() for row, real in zip(hidden, kept, strict=True)]

        return self._in_batches(order, compute)
