"""Frozen stacks in CPU memory: equal to the last bit, and never more than two decoder layers' copies."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.wrapped import freeze, layers_of, llama, tuner_of, wrap
from torch import Tensor

from axolotl_brainstacks.adapter import tuner as tuner_module
from axolotl_brainstacks.adapter.offload import Offload, _Copy, _key
from axolotl_brainstacks.adapter.segment import StackTensors

LAYERS, STACKS = 4, ["s001_chat", "s002_chat", "s003_code"]


class Watched(Offload):
    """Copies where a CPU would need none, spoils those it lets go, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.copied, self.most, self.arriving = 0, 0, 0, False

    def _copied(self, matrix: Tensor, device: torch.device) -> _Copy:
        self.copied += 1
        self.late += not self.arriving
        return _Copy(matrix, matrix.clone(), None)

    def _arrive(self, group: int, device: torch.device) -> None:
        held = self._copies
        # What is not there by now was not copied ahead.
        banks = list(self._groups.values())[group]
        self.late += sum(_key(matrix, device) not in held for bank in banks for matrix in bank.matrices())
        self.arriving = True
        super()._arrive(group, device)
        self.arriving = False
        self._spoil([copied for key, copied in held.items() if key not in self._copies])
        self.most = max(self.most, len(self._copies))

    def forget(self) -> None:
        self._spoil(list(self._copies.values()))
        super().forget()

    @staticmethod
    def _spoil(copies: list[_Copy]) -> None:
        for spoilt in copies:
            with torch.no_grad():
                spoilt.copy.fill_(float("nan"))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[PeftModel, PeftModel, Watched]:
    """The same model with its frozen stacks on the device, and offloaded."""
    monkeypatch.setattr(tuner_module, "Offload", Watched)
    plain, offloaded = (wrap(llama(num_hidden_layers=LAYERS)) for _ in range(2))
    tuner_of(offloaded).offload_frozen()
    exported = freeze(plain, STACKS)
    offloaded.base_model.load_state_dict(plain.base_model.state_dict())
    config = plain.peft_config["default"]
    for name, tensors in exported.items():
        tuner_of(offloaded).attach_stack(name, name.split("_")[1], config, tensors)  # type: ignore[arg-type]
    watched = tuner_of(offloaded)._offload
    assert isinstance(watched, Watched)
    return plain, offloaded, watched


def gradients(model: PeftModel, ids: Tensor) -> list[Tensor]:
    """The loss and the gradient of every trainable weight; the same noise each time."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_training_is_the_same_to_the_last_bit(
    pair: tuple[PeftModel, PeftModel, Watched], checkpointing: bool | None, autocast: bool
) -> None:
    plain, offloaded, watched = pair
    for model in (plain, offloaded):
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    matrices = 2 * 7
    with context:
        for step in range(3):
            ids = torch.randint(64, (3, 11))
            got, expected = gradients(offloaded, ids), gradients(plain, ids)
            assert len(got) == 1 + LAYERS * 7 * 2
            assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))
            # Only the very first layer's stacks had to be waited for; the two layers at a turn are there already.
            assert watched.late == matrices
            assert watched.copied == matrices * (2 + 2 * (LAYERS - 2) * (step + 1))
    assert watched.most == 2 * matrices


def test_answers_and_mixed_rows_are_the_same_to_the_last_bit(pair: tuple[PeftModel, PeftModel, Watched]) -> None:
    plain, offloaded, watched = pair
    ids, weights = torch.randint(1, 64, (3, 9)), torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.7, 0.0], [0.0, 0.0, 0.0]])
    for model in (plain, offloaded):
        model.eval()
    for names, factors in ((STACKS, weights), (STACKS[1:2], None), ([], None), (STACKS, None)):
        results = []
        for model in (plain, offloaded):
            tuner_of(model).use_stacks(names, factors)
            watched.late = 0
            results.append(
                model.generate(
                    ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
                ).logits
            )
        assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))
        assert watched.late == (2 * 7 if names else 0), "a token's last layer is followed by the next token's first"


def test_offloaded_stacks_stay_where_they_are(pair: tuple[PeftModel, PeftModel, Watched]) -> None:
    _, offloaded, _ = pair
    assert not [name for name, _ in offloaded.named_buffers() if ".bank." in name], "DDP would broadcast them"
    offloaded.to("meta")
    for layer in tuner_of(offloaded).brainstacks_layers():
        assert layer.bank.names == STACKS
        assert all(matrix.device.type == "cpu" for matrix in layer.bank.matrices())


def test_copies_belong_to_a_device_and_do_not_go_with_a_copy_of_the_model(
    pair: tuple[PeftModel, PeftModel, Watched],
) -> None:
    plain, offloaded, watched = pair
    ids = torch.randint(64, (2, 5))
    expected = plain.eval()(ids).logits
    assert torch.equal(offloaded.eval()(ids).logits, expected) and watched._copies
    matrix = layers_of(offloaded)[0].bank.matrices()[0]
    assert Offload._copied(watched, matrix, torch.device("meta")).copy.device.type == "meta"
    assert {key[2].type for key in watched._copies} == {"cpu"}
    another = copy.deepcopy(offloaded)
    served = tuner_of(another)._offload
    assert served is not None and served is not watched and not served._copies
    assert torch.equal(another(ids).logits, expected)
    tuner_of(another).use_stacks(STACKS[:1])
    assert torch.equal(offloaded(ids).logits, expected)


def test_a_stack_that_replaces_another_leaves_pending_copies_and_backward_passes_alone(
    pair: tuple[PeftModel, PeftModel, Watched],
) -> None:
    plain, offloaded, _ = pair
    ids = torch.randint(64, (2, 5))
    results = []
    for model in (plain, offloaded):
        loss = model.eval()(ids, labels=ids).loss
        if model is offloaded:
            for layer in layers_of(model):
                bank = layer.bank
                old = bank.segments[0]
                stack = StackTensors(
                    "s004_math", old.shape, torch.zeros_like(layer.brainstacks_A["default"].weight),
                    torch.zeros_like(layer.brainstacks_B["default"].weight), 0, 3,
                )  # fmt: skip
                before = bank.matrices()[0], bank.matrices()[0].clone()
                layer.update_bank({"s001_chat"}, [stack])
                assert torch.equal(*before), "no byte is written where a copy may still read"
        loss.backward()
        results.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert results[0] and all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


def test_weights_of_rows_follow_the_tokens(pair: tuple[PeftModel, PeftModel, Watched]) -> None:
    """They may come from another device than the one that computes, and the matrices are on a third."""
    _, offloaded, _ = pair
    segment = layers_of(offloaded)[0].bank.segments[0]
    segment.select(STACKS, torch.ones(2, 3))
    x = torch.empty(2, 5, 32, device="meta")
    h = torch.empty(2, 5, segment.weights()[0].shape[0], device="meta")
    assert segment.activations(x, h).device.type == "meta"
    assert segment.row_weights.device.type == "meta"


def test_offloading_comes_before_the_first_stack() -> None:
    model = wrap()
    freeze(model, ["s001_chat"])
    with pytest.raises(ValueError, match="before the first forward or attached stack"):
        tuner_of(model).offload_frozen()
