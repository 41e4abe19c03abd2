"""Losses on validation rows, against one row at a time without padding; who computes which batch."""

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save
from support.wrapped import TINY, freeze, layers_of, llama, tuner_of, wrap
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from axolotl_brainstacks import distributed
from axolotl_brainstacks.evaluation import (
    IGNORED,
    Batch,
    Example,
    answer,
    check_vocabulary,
    mean_loss,
    my_batches,
    pack_rows,
    row_losses,
    unpack_rows,
)

CPU = torch.device("cpu")


def random_row(length: int, answers: float = 0.5) -> Example:
    """Token ids from 1 up (0 pads), each answer token with probability `answers`, also as islands between other turns."""
    ids = torch.randint(1, TINY["vocab_size"], (length,)).tolist()
    return Example(ids, [token if torch.rand(()) < answers else IGNORED for token in ids])


def random_rows(count: int) -> list[Example]:
    return [random_row(int(torch.randint(2, 30, ()))) for _ in range(count)]


@torch.no_grad()
def reference_losses(model: nn.Module, rows: list[Example]) -> list[tuple[float, int]]:
    """One row at a time, no padding, float64, token by token."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        total, count = 0.0, 0
        for position in range(1, len(row.labels)):
            if row.labels[position] != IGNORED:
                total -= float(logits[position - 1].log_softmax(0)[row.labels[position]])
                count += 1
        found.append((total, count))
    return found


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=TINY["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make_model", [lambda: llama(initializer_range=0.2), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_losses_equal_a_loop_over_rows_without_padding(
    make_model: Callable[[], PreTrainedModel], batch_size: int
) -> None:
    model, rows = make_model().eval(), random_rows(11)
    expected = reference_losses(model, rows)
    got = row_losses(model, rows, batch_size)
    assert [count for _, count in got] == [count for _, count in expected]
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    total, count = sum(loss for loss, _ in expected), sum(count for _, count in expected)
    assert mean_loss(model, rows, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_losses_of_a_model_with_stacks_do_not_depend_on_the_batch_either() -> None:
    model, rows = wrap(llama(initializer_range=0.2)), random_rows(9)
    freeze(model, ["s001_chat", "s002_chat"])
    expected = reference_losses(model.eval(), rows)
    for batch_size in (1, 4, 9):
        got = row_losses(model, rows, batch_size)
        assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    tuner_of(model).use_stacks([])
    assert mean_loss(model, rows, 4) != pytest.approx(
        sum(x for x, _ in expected) / sum(n for _, n in expected), rel=1e-3
    )


def test_a_model_that_cannot_choose_its_logits() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model, rows = Plain().eval(), random_rows(5)
    expected = reference_losses(model, rows)
    got = row_losses(model, rows, 2)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


def test_rows_without_an_answer_count_nothing() -> None:
    model, rows = llama().eval(), random_rows(3)
    silent = Example([5, 6, 7], [IGNORED] * 3)
    assert row_losses(model, [silent], 1) == [(0.0, 0)]
    assert mean_loss(model, [silent], 1) == 0.0
    first_only = Example([5, 6, 7], [5, IGNORED, IGNORED])  # nothing predicts the first token
    assert row_losses(model, [first_only], 1) == [(0.0, 0)]
    assert mean_loss(model, [silent, *rows, first_only], 2) == pytest.approx(mean_loss(model, rows, 3), rel=1e-5)


def test_measuring_has_dropout_and_noise_off_and_restores_training() -> None:
    model, rows = wrap(noisy_gate=True, lora_dropout=0.5), random_rows(4)
    freeze(model, ["s001_chat"])
    for training in (True, False):
        model.train(training)
        assert row_losses(model, rows, 2) == row_losses(model, rows, 2)
        assert model.training is training and all(layer.training is training for layer in layers_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_packed_rows_come_back() -> None:
    rows = [*random_rows(6), Example([9], [IGNORED]), Example([1, 2], [1, 2])]
    assert unpack_rows(pack_rows(rows)) == rows
    assert unpack_rows(pack_rows([])) == []


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WHOLE = {"input_ids": int32(1, 2, 3), "labels": int32(IGNORED, 2, 3), "lengths": int32(2, 1)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lengths": int32(4, -1)}, "lengths do not add up"),
        ({"lengths": int32(3, 0)}, "lengths do not add up"),
        ({"lengths": int32(2, 2)}, "lengths do not add up"),
        ({"labels": int32(1, 2)}, "lengths do not add up"),
        ({"input_ids": int32(1, -2, 3)}, "it has negative tokens"),
        ({"labels": int32(-99, 2, 3)}, "it has negative tokens"),
        ({"input_ids": torch.tensor([1.0, 2.0, 3.0])}, "no lists of int32"),
        ({"input_ids": torch.tensor([1, 2, 3])}, "no lists of int32"),
        ({"lengths": int32(3).reshape(1, 1)}, "no lists of int32"),
        ({"more": int32(1)}, "it has input_ids, labels, lengths, more"),
        ({"lengths": None}, "it has input_ids, labels"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(change: dict[str, Tensor | None], reason: str) -> None:
    assert len(unpack_rows(save(WHOLE))) == 2
    tensors = {key: tensor for key, tensor in (WHOLE | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=rf"the rows of chat is damaged \((its |its tensors are )?{reason}\): restore"):
        unpack_rows(save(tensors), "the rows of chat")


@pytest.mark.parametrize("data", [b"", b"rows of chat", pack_rows([Example([1, 2], [1, 2])])[:-4]])
def test_bytes_that_are_no_rows_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="restore"):
        unpack_rows(data)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    model, size = wrap(llama()), TINY["vocab_size"]
    check_vocabulary([Example([size - 1], [IGNORED])], model, "The rows")
    for row in (Example([0, size], [IGNORED] * 2), Example([0, 1], [IGNORED, size])):
        with pytest.raises(
            ValueError, match=rf"The rows have the token {size}, but the base model has only {size}.*restore"
        ):
            check_vocabulary([row], model, "The rows")


def test_batches_are_padded_on_the_right() -> None:
    batch = Batch.of([Example([3, 4, 5], [IGNORED, 4, 5]), Example([6], [6])], CPU)
    assert batch.input_ids.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 4, 5], [6, IGNORED, IGNORED]]


def test_the_prompt_ends_where_the_first_answer_begins() -> None:
    assert Example([1, 2, 3, 4], [IGNORED, IGNORED, 3, IGNORED]).prompt_ids == [1, 2]
    assert Example([1, 2], [1, 2]).prompt_ids == []
    assert Example([1, 2], [IGNORED, IGNORED]).prompt_ids == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7, 8, 13])
def test_every_row_is_measured_once_whatever_the_number_of_ranks(
    ranks: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, batch_size = random_rows(count), 2
    alone = {start: batch for start, batch in my_batches(rows, batch_size, CPU) if start is not None}
    seen: list[int] = []
    turns = set()
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = list(my_batches(rows, batch_size, CPU))
        turns.add(len(mine))
        for start, batch in mine:
            if start is None:
                continue
            seen.extend(range(start, start + len(batch.input_ids)))
            assert torch.equal(batch.input_ids, alone[start].input_ids), "a batch depends on the number of ranks"
    assert sorted(seen) == list(range(count))
    assert turns == {math.ceil(len(alone) / ranks)}, "ranks that run a different number of forwards hang"


def test_answers_are_greedy_continuations_of_each_prompt_alone() -> None:
    model = llama(initializer_range=0.5).eval()
    model.generation_config.eos_token_id = None
    rows = [Example(row.input_ids, [IGNORED] * n + row.input_ids[n:]) for n in (3, 7, 5) for row in [random_row(10)]]
    expected = []
    for row in rows:
        ids = row.prompt_ids
        for _ in range(6):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        expected.append(ids[len(row.prompt_ids) :])
    model.train()
    assert answer(model, rows, pad_token_id=0, max_new_tokens=6) == expected
    assert model.training
