"""Losses on fixed validation rows: over answer tokens only, without padding, independent of who computes which batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from axolotl_brainstacks.distributed import gather_objects, rank, world_size
from axolotl_brainstacks.guarded import parse_tensors, printable

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A tokenised example; labels are -100 wherever no answer token is to be predicted."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first answer token."""
        return self.input_ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), 0)]


def pack_rows(rows: Sequence[Example]) -> bytes:
    """The rows as the bytes of a safetensors file."""
    flat = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "lengths": [len(row.input_ids) for row in rows],
    }
    return save_safetensors({name: torch.tensor(values, dtype=torch.int32) for name, values in flat.items()})


def unpack_rows(data: bytes, name: object = "the file of rows") -> list[Example]:
    """The inverse. Raises ValueError calling the bytes `name` unless they are such a file."""
    tensors = parse_tensors(data, name)
    fix = f"{printable(name)} is damaged ({{}}): restore it from a copy"
    if tensors.keys() != {"input_ids", "labels", "lengths"}:
        raise ValueError(fix.format(f"it has {printable(', '.join(sorted(tensors)))[:200] or 'nothing'}"))
    if any(tensor.dtype != torch.int32 or tensor.dim() != 1 for tensor in tensors.values()):
        raise ValueError(fix.format("its tensors are no lists of int32"))
    ids, labels, lengths = (tensors[key].tolist() for key in ("input_ids", "labels", "lengths"))
    if any(length < 1 for length in lengths) or not sum(lengths) == len(ids) == len(labels):
        raise ValueError(fix.format("its lengths do not add up"))
    if any(token < 0 for token in ids) or any(label < 0 and label != IGNORED for label in labels):
        raise ValueError(fix.format("it has negative tokens"))
    starts = [0, *accumulate(lengths)]
    return [Example(ids[start:end], labels[start:end]) for start, end in pairwise(starts)]


def check_vocabulary(rows: Iterable[Example], model: nn.Module, name: str) -> None:
    """Raises ValueError, calling the rows `name`, for a token that the model does not have: on a GPU it would end the
    process. `model` is a Transformers model, or one of PEFT's."""
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max((token for row in rows for token in [*row.input_ids, *row.labels]), default=0)
    if largest >= size:
        raise ValueError(
            f"{name} have the token {largest}, but the base model has only {size}: they were made with another tokenizer, or "
            "altered; restore them from a copy of the library"
        )


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length; tensors (rows, tokens)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Example], device: torch.device) -> Batch:
        length = max(len(row.input_ids) for row in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in values], device=device)

        return cls(
            padded([row.input_ids for row in rows], 0),
            padded([[1] * len(row.input_ids) for row in rows], 0),
            padded([row.labels for row in rows], IGNORED),
        )


def my_batches(rows: Sequence[Example], batch_size: int, device: torch.device) -> Iterator[tuple[int | None, Batch]]:
    """This rank's share of the batches, as (index of its first row, batch).

    Every rank gets the same number of batches, because a sharded model's forward is a collective; a surplus batch has
    index None and its result is dropped. What is in a batch does not depend on the number of ranks.
    """
    own, ranks = rank(), world_size()
    starts = list(range(0, len(rows), batch_size))
    for turn in range(-(-len(starts) // ranks)):
        number = turn * ranks + own
        start = starts[min(number, len(starts) - 1)]
        yield start if number < len(starts) else None, Batch.of(rows[start : start + batch_size], device)


@torch.no_grad()
def batch_losses(model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
    """Per row: summed cross-entropy over its answer tokens in fp32, nats, and their number.

    The vocabulary's logits are computed only at positions that some row's answer reads, where the model can do that.
    """
    targets = batch.labels[:, 1:]
    read = (targets != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        # A list serves on whatever device the last layer is.
        logits = model(**inputs, logits_to_keep=read.tolist()).logits
    else:
        logits = model(**inputs).logits[:, read]
    losses = []
    for row_logits, row_targets in zip(logits, targets[:, read], strict=True):
        answers = row_targets != IGNORED
        loss = F.cross_entropy(row_logits[answers].float(), row_targets[answers], reduction="sum")
        losses.append((float(loss), int(answers.sum())))
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in evaluation mode: no dropout, no noise in the gates."""
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """Per row: `batch_losses`. Equal on every rank."""
    device = next(model.parameters()).device
    mine: dict[int, tuple[float, int]] = {}
    with evaluating(model):
        for start, batch in my_batches(rows, batch_size, device):
            losses = batch_losses(model, batch)
            if start is not None:
                mine.update(enumerate(losses, start))
    everything: dict[int, tuple[float, int]] = {}
    for part in gather_objects(mine):
        everything.update(part)
    return [everything[i] for i in range(len(rows))]


def mean_loss(model: nn.Module, rows: Sequence[Example], batch_size: int) -> float:
    """Mean cross-entropy per answer token over all rows, in nats."""
    losses = row_losses(model, rows, batch_size)
    return sum(loss for loss, _ in losses) / max(sum(tokens for _, tokens in losses), 1)


@torch.no_grad()
def answer(model: Any, rows: Sequence[Example], pad_token_id: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of the rows' prompts, as token ids."""
    prompts = [row.prompt_ids for row in rows]
    length = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad_token_id] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    with evaluating(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_token_id,
            synced_gpus=world_size() > 1,
            use_cache=True,
        )
    return output[:, length:].tolist()
