"""One projection and its bank of frozen stacks, against a float64 loop over stacks and experts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.wrapped import assert_near
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from axolotl_brainstacks.adapter import BrainstacksConfig, BrainstacksLinear

IN, OUT = 24, 40
QUIET = {"noisy_gate": False, "balance_coef": 0.0}
SHAPES = [
    {"r": 3, "num_experts": 4, "top_k": 2},
    {"r": 5, "num_experts": 2, "top_k": 1, "lora_alpha": 3.0},
    {"r": 3, "num_experts": 4, "top_k": 3},
    {"r": 2, "num_experts": 3, "top_k": 3, "use_rslora": False},
    {"r": 4, "num_experts": 1, "top_k": 1},
]


@dataclass
class Stack:
    """A stack as its file holds it."""

    config: BrainstacksConfig
    a: Tensor
    b: Tensor


def random_stack(shape: dict[str, Any], size: tuple[int, int] = (IN, OUT), dtype: torch.dtype = torch.float64) -> Stack:
    config = BrainstacksConfig(**shape, **QUIET)
    n, ranks = config.num_experts, config.num_experts * config.r
    a, b = torch.randn(2 * n + ranks, size[0], dtype=dtype), torch.randn(size[1], ranks, dtype=dtype)
    return Stack(config, a / math.sqrt(size[0]), b / math.sqrt(ranks))


def reference_delta(stack: Stack, x: Tensor) -> Tensor:
    """(rows, tokens, in) -> (rows, tokens, out), float64: sum over experts of gate * scale * B_i (A_i x)."""
    config, n, r = stack.config, stack.config.num_experts, stack.config.r
    a, b = stack.a.double(), stack.b.double()
    logits = x @ a[:n].T
    best = logits.topk(config.top_k, dim=-1).indices
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    gates = logits.masked_fill(~kept, -math.inf).softmax(-1)
    scale = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
    delta = x.new_zeros(*x.shape[:-1], b.shape[0])
    for e in range(n):
        expert_a, expert_b = a[2 * n + e * r : 2 * n + (e + 1) * r], b[:, e * r : (e + 1) * r]
        delta = delta + gates[..., e : e + 1] * scale * (x @ expert_a.T @ expert_b.T)
    return delta


def layer_with(
    base: nn.Module, frozen: Sequence[Stack], active: Stack | None = None, on: Sequence[int] | None = None
) -> BrainstacksLinear:
    """A layer whose frozen stacks are named s0, s1, ...; those of `on` are on, by default all."""
    layer = BrainstacksLinear(base.requires_grad_(False), "layers.0.some_proj")
    if active is not None:
        layer.update_layer("default", active.config)
        layer.brainstacks_A["default"].weight.data = active.a.clone()
        layer.brainstacks_B["default"].weight.data = active.b.clone()
    for i, stack in enumerate(frozen):
        layer.attach(f"s{i}", stack.config, stack.a, stack.b)
    layer.bank.select([f"s{i}" for i in (range(len(frozen)) if on is None else on)])
    return layer


def linear() -> nn.Module:
    return nn.Linear(IN, OUT, dtype=torch.float64)


def conv1d() -> nn.Module:
    return Conv1D(OUT, IN).double()


def base_output(base: nn.Module, x: Tensor) -> Tensor:
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    return x @ weight + base.bias


@pytest.mark.parametrize("make_base", [linear, conv1d])
@pytest.mark.parametrize("shapes", [[0], [0, 0, 0], SHAPES_ALL := [0, 0, 1, 2, 0, 3, 4]], ids=str)
def test_forward_and_backward_equal_the_loop(make_base: Callable[[], nn.Module], shapes: list[int]) -> None:
    base, active = make_base(), random_stack(SHAPES[2])
    frozen = [random_stack(SHAPES[i]) for i in shapes]
    layer = layer_with(base, frozen, active)
    x = torch.randn(3, 7, IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, OUT, dtype=torch.float64)

    y = layer(x)
    y.backward(upstream)

    x_ref = x.detach().clone().requires_grad_()
    active.a.requires_grad_(), active.b.requires_grad_()
    y_ref = base_output(base, x_ref) + sum(reference_delta(stack, x_ref) for stack in [*frozen, active])
    y_ref.backward(upstream)
    assert active.a.grad is not None and x.grad is not None
    a_grad, b_grad = layer.brainstacks_A["default"].weight.grad, layer.brainstacks_B["default"].weight.grad
    # The gates are computed in fp32.
    assert_near(y, y_ref, 1e-5)
    assert_near(x.grad, x_ref.grad, 1e-5)
    assert_near(a_grad, active.a.grad, 1e-5)
    assert_near(b_grad, active.b.grad, 1e-5)


def test_consecutive_stacks_of_one_shape_share_their_tensors() -> None:
    layer = layer_with(linear(), [random_stack(SHAPES[i]) for i in SHAPES_ALL])
    assert [segment.names for segment in layer.bank.segments] == [["s0", "s1"], ["s2"], ["s3"], ["s4"], ["s5"], ["s6"]]
    assert layer.bank.names == [f"s{i}" for i in range(7)]


def test_gradient_reaches_x_through_frozen_stacks_and_no_frozen_tensor() -> None:
    frozen = [random_stack(SHAPES[i]) for i in SHAPES_ALL]
    layer = layer_with(linear(), frozen)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    layer(x).sin().sum().backward()
    x_ref = x.detach().clone().requires_grad_()
    out = base_output(layer.base_layer, x_ref)
    (out + sum(reference_delta(stack, x_ref) for stack in frozen)).sin().sum().backward()
    assert x.grad is not None and x_ref.grad is not None
    assert_near(x.grad, x_ref.grad, 1e-5)
    # A gradient that misses one stack's part is far from it, so the comparison above sees every stack.
    for i, lost in enumerate(frozen):
        x_lost = x.detach().clone().requires_grad_()
        deltas = [reference_delta(s, x_lost.detach() if s is lost else x_lost) for s in frozen]
        (base_output(layer.base_layer, x_lost) + sum(deltas)).sin().sum().backward()
        assert x_lost.grad is not None
        assert (x.grad - x_lost.grad).norm() > 1e-2 * x_ref.grad.norm(), (
            f"the gradient through s{i} is too small to see"
        )
    buffers = dict(layer.bank.named_buffers())
    assert buffers and not any(buffer.requires_grad or buffer.grad is not None for buffer in buffers.values())
    assert not list(layer.bank.parameters())


@pytest.mark.parametrize("on", [[0, 1, 2, 3, 4, 5, 6], [1], [0, 4], [0, 2, 5], [1, 3, 4, 6]], ids=str)
def test_any_selection_and_per_row_weights(on: list[int]) -> None:
    base, frozen = linear(), [random_stack(SHAPES[i]) for i in SHAPES_ALL]
    layer = layer_with(base, frozen, on=on)
    x = torch.randn(4, 6, IN, dtype=torch.float64)
    assert_near(layer(x), base_output(base, x) + sum(reference_delta(frozen[i], x) for i in on), 1e-5)

    weights = torch.rand(4, len(on)) * (torch.rand(4, len(on)) > 0.4)
    order = torch.randperm(len(on)).tolist()  # the caller's order is free, the columns follow it
    layer.bank.select([f"s{on[j]}" for j in order], weights[:, order])
    expected = base_output(base, x)
    for j, i in enumerate(on):
        expected = expected + weights[:, j, None, None].double() * reference_delta(frozen[i], x)
    assert_near(layer(x), expected, 1e-5)

    layer.bank.select([])
    assert torch.equal(layer(x), base(x))


def test_row_weights_follow_repeated_rows_as_in_beam_search() -> None:
    base, frozen = linear(), [random_stack(SHAPES[0]) for _ in range(2)]
    layer, x = layer_with(base, frozen), torch.randn(6, 4, IN, dtype=torch.float64)
    weights = torch.rand(2, 2)
    layer.bank.select(["s0", "s1"], weights)
    expected = base_output(base, x)
    for row in range(6):
        for j, stack in enumerate(frozen):
            expected[row] += weights[row // 3, j] * reference_delta(stack, x[row : row + 1])[0]
    assert_near(layer(x), expected, 1e-5)
    layer.bank.select(["s0", "s1"], weights[:1])
    expected = base_output(base, x) + sum(
        float(w) * reference_delta(s, x) for w, s in zip(weights[0], frozen, strict=True)
    )
    assert_near(layer(x), expected, 1e-5)


def test_rows_of_a_mixed_batch_equal_the_rows_alone() -> None:
    frozen = [random_stack(SHAPES[i]) for i in (0, 0, 1)]
    layer, x = layer_with(linear(), frozen), torch.randn(3, 5, IN, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0.5, 0, 0.25]])
    layer.bank.select(["s0", "s1", "s2"], weights)
    together = layer(x)
    for row in range(3):
        names = [f"s{j}" for j in range(3) if weights[row, j]]
        layer.bank.select(names, weights[row : row + 1, weights[row] != 0])
        assert_near(together[row : row + 1], layer(x[row : row + 1]), 1e-6)


def test_tokens_without_a_batch_dimension() -> None:
    base, frozen, active = linear(), [random_stack(SHAPES[0])], random_stack(SHAPES[1])
    x = torch.randn(5, IN, dtype=torch.float64)
    expected = base_output(base, x) + reference_delta(frozen[0], x[None])[0] + reference_delta(active, x[None])[0]
    assert_near(layer_with(base, frozen, active)(x), expected, 1e-5)


def test_tokens_of_all_rows_in_one_line_have_one_rows_weights_or_none() -> None:
    base, frozen = linear(), [random_stack(SHAPES[0]) for _ in range(2)]
    layer, x = layer_with(base, frozen), torch.randn(6, IN, dtype=torch.float64)
    weights = torch.rand(2, 2)
    layer.bank.select(["s0", "s1"], weights[:1])
    deltas = (float(w) * reference_delta(s, x[None])[0] for w, s in zip(weights[0], frozen, strict=True))
    assert_near(layer(x), base_output(base, x) + sum(deltas), 1e-5)
    layer.bank.select(["s0", "s1"], weights)
    with pytest.raises(ValueError, match=r"one prompt at a time .*`eval_batch_size: 1`.*`lora_exclude_modules`"):
        layer(x)


def test_a_removed_stack_is_gone_and_the_others_stay() -> None:
    base, frozen = linear(), [random_stack(SHAPES[i]) for i in (0, 0, 1, 0)]
    layer, x = layer_with(base, frozen), torch.randn(2, 5, IN, dtype=torch.float64)
    for gone, left in ((0, [1, 2, 3]), (2, [1, 3]), (3, [1])):
        layer.bank.remove(f"s{gone}")
        layer.bank.select(names := [f"s{i}" for i in left])
        assert layer.bank.names == names
        assert_near(layer(x), base_output(base, x) + sum(reference_delta(frozen[i], x) for i in left), 1e-5)
    layer.bank.remove("s1")
    assert not layer.bank.active and not layer.bank.segments


# To the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(24, 40), (33, 17), (64, 128)], ids=str)
@pytest.mark.parametrize("on", [[0], [1], [0, 1, 2], [0, 2], [1, 2, 3]], ids=str)
def test_what_was_computed_before_later_stacks_came_is_computed_the_same(
    dtype: torch.dtype, size: tuple[int, int], on: list[int]
) -> None:
    base = nn.Linear(*size, dtype=dtype)
    stacks = [random_stack(SHAPES[i], size, torch.float32) for i in (0, 0, 0, 1, 1, 0, 0)]
    layer, x = layer_with(base, stacks[:4], on=on), torch.randn(3, 9, size[0]).to(dtype)
    weights = torch.rand(3, len(on))
    names = [f"s{i}" for i in on]
    before = layer(x)
    layer.bank.select(names, weights)
    weighted_before = layer(x)
    for i in (4, 5, 6):
        layer.attach(f"s{i}", stacks[i].config, stacks[i].a, stacks[i].b)
    for _ in range(4):
        # Other selections in between may move the stacks in memory.
        layer.bank.select([f"s{i}" for i in torch.randperm(7)[: int(torch.randint(1, 7, ()))].tolist()])
        layer.bank.select(names)
        assert torch.equal(layer(x), before)
        layer.bank.select(names, weights)
        assert torch.equal(layer(x), weighted_before)


# Not to the last bit: the bank leaves out the noise rows and holds B transposed, and BLAS rounds by shape and layout.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frozen_stack_equals_the_active_one_it_was_exported_from(shape: dict[str, Any]) -> None:
    active = random_stack(shape, dtype=torch.float32)
    training = layer_with(nn.Linear(IN, OUT), [], active).eval()
    x = torch.randn(3, 9, IN)
    expected = training(x)
    frozen = Stack(active.config, *training.export_stack("default"))
    layer = layer_with(training.base_layer, [frozen])
    assert_near(layer(x), expected, 1e-6)
    assert torch.equal(frozen.a, active.a) and torch.equal(frozen.b, active.b)


# Other base layers, other dtypes


def quantised(kind: str) -> nn.Module:
    import bitsandbytes as bnb

    source = nn.Linear(64, 128)
    if kind == "4bit":
        layer: nn.Module = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kind,tolerance", [("4bit", 1e-5), ("8bit", 2e-2)])
def test_over_a_quantised_projection(kind: str, tolerance: float) -> None:
    base = quantised(kind)
    active = random_stack(SHAPES[0], (64, 128), torch.float32)
    frozen = [random_stack(SHAPES[i], (64, 128), torch.float32) for i in (0, 0, 1)]
    layer = layer_with(base, frozen, active)
    x = torch.randn(3, 7, 64, requires_grad=True)
    upstream = torch.randn(3, 7, 128)
    y = layer(x)
    y.backward(upstream)

    base_x = x.detach().clone().requires_grad_()
    base_y = base(base_x)
    base_y.backward(upstream)
    x_ref = x.detach().double().requires_grad_()
    active.a.requires_grad_(), active.b.requires_grad_()
    delta = sum(reference_delta(stack, x_ref) for stack in [*frozen, active])
    assert isinstance(delta, Tensor)
    delta.backward(upstream.double())
    assert x.grad is not None and base_x.grad is not None and x_ref.grad is not None and active.b.grad is not None
    assert y.dtype == torch.float32
    assert_near(y, base_y.double() + delta, tolerance)
    assert_near(x.grad, base_x.grad.double() + x_ref.grad, tolerance)
    assert_near(layer.brainstacks_B["default"].weight.grad, active.b.grad, 1e-5)


def test_over_a_bf16_projection_the_active_stack_stays_in_its_own_dtype() -> None:
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    active, frozen = (random_stack(SHAPES[0], dtype=torch.float32) for _ in range(2))
    x = torch.randn(3, 7, IN, dtype=torch.bfloat16)
    alone = layer_with(base, [], active)
    y = alone(x)
    assert y.dtype == torch.bfloat16
    rounded = reference_delta(active, x.double()).to(torch.bfloat16)
    assert_near(y, base(x) + rounded, 2e-2)
    layer = layer_with(base, [frozen], active)
    assert all(buffer.dtype == torch.bfloat16 for buffer in layer.bank.buffers())
    assert layer.brainstacks_A["default"].weight.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16


def test_frozen_stacks_may_be_kept_in_bf16_over_an_fp32_projection() -> None:
    base = nn.Linear(IN, OUT)
    everyone = SHAPES[0] | {"top_k": SHAPES[0]["num_experts"]}  # rounded logits may prefer other experts
    frozen, active = [random_stack(everyone) for _ in range(2)], random_stack(everyone, dtype=torch.float32)
    layer = layer_with(base, [], active)
    whole = layer.bank_bytes(layer.shapes["default"])
    layer.frozen_dtype = torch.bfloat16
    for i, stack in enumerate(frozen):
        stack.a, stack.b = stack.a.bfloat16().double(), stack.b.bfloat16().double()
        layer.attach(f"s{i}", stack.config, stack.a, stack.b)
    layer.bank.select(["s0", "s1"])
    held = list(layer.bank.buffers())
    assert {buffer.dtype for buffer in held} == {torch.bfloat16}
    assert sum(buffer.nbytes for buffer in held) == len(frozen) * layer.bank_bytes(layer.shapes["default"]) == whole
    x = torch.randn(3, 7, IN).bfloat16().float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = (
        layer(x),
        base(x.detach()).double() + sum(reference_delta(stack, exact) for stack in [*frozen, active]),
    )
    assert y.dtype == torch.float32
    assert_near(y, expected, 2e-2)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert x.grad is not None and exact.grad is not None
    base_part = upstream.double() @ base.weight.double()
    assert_near(x.grad, exact.grad + base_part, 2e-2)


# A fresh stack


def test_a_fresh_stack_is_the_identity_and_starts_as_the_paper_says() -> None:
    layer = BrainstacksLinear(nn.Linear(512, OUT), "layers.0.q_proj")
    layer.update_layer("default", BrainstacksConfig(r=16, num_experts=4, **QUIET))
    x = torch.randn(2, 5, 512)
    assert torch.equal(layer(x), layer.base_layer(x))
    a, b = layer.brainstacks_A["default"].weight.detach(), layer.brainstacks_B["default"].weight
    assert float(a[:4].std()) == pytest.approx(0.02, rel=0.1)
    assert not a[4:8].any() and not b.any()
    experts, bound = a[8:], 1 / math.sqrt(512)  # Kaiming-uniform with a = sqrt(5)
    assert float(experts.abs().max()) <= bound
    assert float(experts.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_reset_is_a_function_of_seed_and_module_name() -> None:
    def fresh(name: str, seed: int) -> Tensor:
        torch.rand(int(torch.randint(1, 9, ())))  # whatever the global generator's state
        layer = BrainstacksLinear(nn.Linear(IN, OUT), name)
        layer.update_layer("default", BrainstacksConfig(r=2))
        layer.brainstacks_B["default"].weight.data.normal_()
        layer.reset_stack("default", seed)
        assert not layer.brainstacks_B["default"].weight.any()
        return layer.brainstacks_A["default"].weight.detach()

    assert torch.equal(fresh("layers.0.q_proj", 5), fresh("layers.0.q_proj", 5))
    assert not torch.equal(fresh("layers.0.q_proj", 5), fresh("layers.0.k_proj", 5))
    assert not torch.equal(fresh("layers.0.q_proj", 5), fresh("layers.0.q_proj", 6))


def test_dropout_acts_on_the_stack_alone_and_in_training_only() -> None:
    base, stack = linear(), random_stack(SHAPES[0] | {"lora_dropout": 0.5})
    layer, x = layer_with(base, [random_stack(SHAPES[0])], stack), torch.randn(2, 5, IN, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.brainstacks_B["default"].weight.data.zero_()
    assert torch.equal(layer(x), layer.eval()(x))


# Errors


@pytest.mark.parametrize("which", ["a rows", "a columns", "b rows", "b columns", "rank"])
def test_a_stack_of_the_wrong_shape_is_refused(which: str) -> None:
    stack = random_stack(SHAPES[0])
    a, b, config = stack.a, stack.b, stack.config
    if which == "rank":
        config = BrainstacksConfig(**SHAPES[0] | {"r": 4})
    else:
        wrong = {"a rows": a[:-1], "a columns": a[:, :-1], "b rows": b[:-1], "b columns": b[:, :-1]}[which]
        a, b = (wrong, b) if which[0] == "a" else (a, wrong)
    layer = layer_with(linear(), [])
    with pytest.raises(ValueError, match=r"Stack s9.*some_proj.*24 -> 40"):
        layer.attach("s9", config, a, b)
    assert not layer.bank.names


@pytest.mark.parametrize(
    "module", [nn.Embedding(8, 4), nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)]
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_only_linear_modules_can_be_wrapped(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"wte.*{type(module).__name__}"):
        BrainstacksLinear(module, "wte")


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"num_experts": 0}, {"top_k": 0}, {"top_k": 5}, {"lora_dropout": 1.0}, {"balance_coef": -1.0}]
)
def test_a_config_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BrainstacksConfig(**wrong)
