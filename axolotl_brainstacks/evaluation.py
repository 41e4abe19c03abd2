"""Losses on fixed examples: over answer tokens only, and the same whichever process computes which batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from axolotl_brainstacks.distributed import my_share, over_ranks, world_size
from axolotl_brainstacks.guarded import parse_tensors, printable

IGNORED = -100  # the label of tokens that are no answer, as in Transformers


@dataclass(frozen=True)
class Example:
    """A tokenised example.

    Attributes:
        input_ids: all tokens, those of the prompt and of the answer.
        labels: as many; the token itself in the answer, -100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first answer token."""
        return self.input_ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), 0)]


def pack_rows(rows: Sequence[Example]) -> bytes:
    """The examples `rows` as the bytes of a safetensors file."""
    flat = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "lengths": [len(row.input_ids) for row in rows],
    }
    return save_safetensors({name: torch.tensor(values, dtype=torch.int32) for name, values in flat.items()})


def unpack_rows(data: bytes, name: object = "the file of rows") -> list[Example]:
    """The inverse of `pack_rows`.

    Args:
        data: content of the file.
        name: of the file, for errors.

    Raises:
        ValueError: if `data` is not what `pack_rows` writes.
    """
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
    """Check that the model has an embedding for every token. On a GPU, one without would abort the process.

    Args:
        rows: examples.
        model: a Transformers model, or a PeftModel.
        name: of the examples, for the error.

    Raises:
        ValueError: if an example has a token outside of the vocabulary.
    """
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max((token for row in rows for token in [*row.input_ids, *row.labels]), default=0)
    if largest >= size:
        raise ValueError(
            f"{name} have the token {largest}, but the base model has only {size}: they were made with another tokenizer, or "
            "altered; restore them from a copy of the library"
        )


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length.

    Attributes:
        input_ids: (rows, tokens), int64.
        attention_mask: (rows, tokens), int64, 1 at real tokens.
        labels: (rows, tokens), int64, -100 outside of answers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Example], device: torch.device) -> Batch:
        """A batch of the examples `rows` on `device`."""
        return cls(
            _padded([row.input_ids for row in rows], 0, device),
            _padded([[1] * len(row.input_ids) for row in rows], 0, device),
            _padded([row.labels for row in rows], IGNORED, device),
        )


def _padded(values: list[list[int]], fill: int, device: torch.device) -> Tensor:
    length = max(map(len, values))
    return torch.tensor([row + [fill] * (length - len(row)) for row in values], device=device)


def my_batches(rows: Sequence[Example], batch_size: int, device: torch.device) -> Iterator[tuple[int | None, Batch]]:
    """This process's share of the batches, as pairs (index of the batch's first example, batch).

    Batches are divided by `my_share`; a surplus one has index None, and the caller must drop its result. The content of a
    batch does not depend on the number of processes, so neither does the rounding of its losses.
    """
    starts = range(0, len(rows), batch_size)
    for number, counts in my_share(len(starts)):
        start = starts[number]
        yield start if counts else None, Batch.of(rows[start : start + batch_size], device)


@torch.no_grad()
def batch_losses(model: nn.Module, batch: Batch) -> list[tuple[float, int]]:
    """For each row, the cross-entropy summed over its answer tokens (nats, computed in fp32), and their number.

    If the model supports it, the logits are computed only at positions that predict an answer token of some row.
    """
    targets = batch.labels[:, 1:]  # (rows, tokens - 1): position t predicts token t + 1
    read = (targets != IGNORED).any(0).nonzero().squeeze(1)  # (positions,)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    base: Any = getattr(model, "get_base_model", lambda: model)()  # of a PeftModel, whose own forward takes anything
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        # A list, not a tensor: the last layer may be on another device than the batch.
        logits = model(**inputs, logits_to_keep=read.tolist()).logits
    else:
        logits = model(**inputs).logits[:, read]
    # logits: (rows, positions, vocabulary)
    losses = []
    for row_logits, row_targets in zip(logits, targets[:, read], strict=True):
        answers = row_targets != IGNORED
        loss = F.cross_entropy(row_logits[answers].float(), row_targets[answers], reduction="sum")
        losses.append((float(loss), int(answers.sum())))
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode for the length of a `with` block: no dropout, no noise in the gates."""
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """`batch_losses` of all examples `rows`, in their order. The processes share the work, and each gets all results."""
    device = next(model.parameters()).device
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(model):
        losses = over_ranks(batches, lambda batch: batch_losses(model, Batch.of(batch, device)))
    return [loss for of_batch in losses for loss in of_batch]


def mean_loss(model: nn.Module, rows: Sequence[Example], batch_size: int) -> float:
    """Mean cross-entropy per answer token over all examples, in nats. Every process must call this."""
    losses = row_losses(model, rows, batch_size)
    return sum(loss for loss, _ in losses) / max(sum(tokens for _, tokens in losses), 1)


@torch.no_grad()
def answer(model: Any, rows: Sequence[Example], pad_token_id: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of the examples' prompts, as token ids; shorter ones end in padding."""
    # Padded on the left, so that every prompt ends where generation begins.
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
