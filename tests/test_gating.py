"""Gates and the load balance, against plain float64 formulas; the injected gradient, against the explicit loss."""

import math

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from wrapped import TINY, assert_near, layers_of, revive, wrap

from axolotl_brainstacks.adapter.gating import add_loss, balance_loss, expert_use, noisy_logits, top_k_gates
from axolotl_brainstacks.adapter.layer import BrainstacksLayer

SHAPES = [(1, 1), (2, 1), (4, 2), (5, 3), (4, 4)]


@pytest.mark.parametrize("experts,k", SHAPES)
def test_gates_are_the_softmax_of_the_k_largest_logits(experts: int, k: int) -> None:
    logits = torch.randn(3, 7, experts, dtype=torch.float64) * 3
    gates = top_k_gates(logits, k)
    for row, gate in zip(logits.flatten(0, 1).tolist(), gates.flatten(0, 1).tolist(), strict=True):
        kept = sorted(range(experts), key=lambda e: -row[e])[:k]
        total = sum(math.exp(row[e]) for e in kept)
        expected = [math.exp(row[e]) / total if e in kept else 0.0 for e in range(experts)]
        assert gate == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("experts,k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_k_gates_are_not_zero_also_under_ties(experts: int, k: int, dtype: torch.dtype) -> None:
    tied = torch.randint(0, 2, (2, 50, experts)).to(dtype)
    for logits in (tied, torch.zeros_like(tied), torch.randn_like(tied)):
        gates = top_k_gates(logits, k)
        assert gates.dtype == dtype and gates.shape == logits.shape
        assert ((gates != 0).sum(-1) == k).all()
        torch.testing.assert_close(gates.float().sum(-1), torch.ones(2, 50), rtol=0, atol=1e-2)


def test_the_gates_gradient_is_exact() -> None:
    # Far from ties the choice of experts is locally constant, so the gates are smooth.
    logits = torch.stack([torch.randperm(5).double() + 0.3 * torch.rand(5).double() for _ in range(6)])
    logits.requires_grad_()
    for k in (1, 2, 3, 5):
        assert torch.autograd.gradcheck(lambda x, k=k: top_k_gates(x, k), logits)


def test_noise_is_gaussian_with_a_softplus_scale() -> None:
    logits, noise = torch.randn(4), torch.randn(4)
    drawn = noisy_logits(logits.expand(40_000, 4), noise.expand(40_000, 4))
    scale = torch.log1p(noise.exp())
    torch.testing.assert_close(drawn.mean(0), logits, rtol=0, atol=6 * float(scale.max()) / 200)
    torch.testing.assert_close(drawn.std(0), scale, rtol=0.03, atol=0)


def test_expert_use_counts_assignments() -> None:
    gates = top_k_gates(torch.randn(3, 20, 4), 2)
    use = expert_use(gates, 2)
    counts = [sum(1 for gate in gates.flatten(0, 1).tolist() if gate[e] != 0) / (60 * 2) for e in range(4)]
    assert use.tolist() == pytest.approx(counts)
    assert float(use.sum()) == pytest.approx(1.0)
    assert not expert_use(gates.requires_grad_(), 2).requires_grad


def reference_balance(logits: Tensor, k: int) -> Tensor:
    """N * sum_e P(e) f(e), token by token."""
    tokens = logits.flatten(0, -2)
    experts = tokens.shape[-1]
    total = tokens.new_zeros(())
    for e in range(experts):
        p = sum(token.softmax(0)[e] for token in tokens) / len(tokens)
        f = sum(e in token.topk(k).indices.tolist() for token in tokens) / (k * len(tokens))
        total = total + p * f
    return experts * total


@pytest.mark.parametrize("experts,k", SHAPES)
def test_balance_loss_and_its_gradient(experts: int, k: int) -> None:
    # 19 tokens cannot be shared evenly; where they are, the gradient is zero and should be.
    logits = torch.randn(1, 19, experts, dtype=torch.float64, requires_grad=True)
    loss = balance_loss(logits, expert_use(top_k_gates(logits, k), k))
    expected = reference_balance(logits, k)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-7)
    if experts > 1 and k < experts:
        assert gradient.abs().max() > 1e-6


def test_balance_loss_is_one_when_balanced_and_n_when_one_expert_gets_all() -> None:
    one_each = 50 * torch.eye(4, dtype=torch.float64)
    assert float(balance_loss(one_each, expert_use(top_k_gates(one_each, 1), 1))) == pytest.approx(1.0)
    one_gets_all = torch.tensor([[50.0, 0, 0, 0]] * 8, dtype=torch.float64)
    assert float(balance_loss(one_gets_all, expert_use(top_k_gates(one_gets_all, 1), 1))) == pytest.approx(4.0)


def test_add_loss_changes_no_value_and_adds_scale_times_the_gradient() -> None:
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    carrier_of, loss_of, scale = (lambda w: (w * 3).sin()), (lambda w: (w**2).sum()), 0.37

    carrier = carrier_of(w)
    assert torch.equal(add_loss(carrier, loss_of(w), scale), carrier)
    upstream = torch.randn(6, dtype=torch.float64)
    (got,) = torch.autograd.grad((add_loss(carrier_of(w), loss_of(w), scale) * upstream).sum(), w)
    (plain,) = torch.autograd.grad((carrier_of(w) * upstream).sum(), w)
    torch.testing.assert_close(got - plain, scale * 2 * w.detach(), rtol=1e-12, atol=1e-12)
    # The upstream gradient scales the carrier's part alone: also where it is zero, as at a fresh stack's zero B.
    (alone,) = torch.autograd.grad((add_loss(carrier_of(w), loss_of(w), scale) * 0).sum(), w)
    torch.testing.assert_close(alone, scale * 2 * w.detach(), rtol=1e-12, atol=1e-12)


# The same on a wrapped model


def tokens() -> Tensor:
    """A batch of 13 tokens, which 4 experts cannot share evenly."""
    return torch.randint(0, TINY["vocab_size"], (1, 13))


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return gradients(model)


def explicit_step(model: PeftModel, ids: Tensor, coef: float) -> dict[str, Tensor]:
    """Gradients of `task loss + coef * sum of balance losses`, the latter from the layers' own inputs, without injection."""
    losses: list[Tensor] = []

    def collect(layer: BrainstacksLayer, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        n = layer.configs["default"].num_experts
        logits = inputs[0] @ layer.brainstacks_A["default"].weight[:n].T
        losses.append(reference_balance(logits, layer.configs["default"].top_k))

    for layer in layers_of(model):
        layer.configs["default"].balance_coef = 0.0
    hooks = [layer.register_forward_hook(collect) for layer in layers_of(model)]
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss + coef * torch.stack(losses).sum()).backward()
    for hook in hooks:
        hook.remove()
    for layer in layers_of(model):
        layer.configs["default"].balance_coef = coef
    return gradients(model)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_injected_gradient_equals_the_explicit_loss_under_every_kind_of_checkpointing(scale: float) -> None:
    coef = 0.5
    model = wrap(r=2, num_experts=4, top_k=2, noisy_gate=False, balance_coef=coef)
    revive(model)
    model.train()
    ids = tokens()
    expected = explicit_step(model, ids, coef * scale)
    without = explicit_step(model, ids, 0.0)
    for layer in layers_of(model):
        layer.configs["default"].balance_coef = coef
        layer.balance_scale = scale
    model.enable_input_require_grads()
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step(model, ids)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_near(got[name], gradient, 1e-4, f"{name}, reentrant {reentrant}")
        gates = [name for name in got if "brainstacks_A" in name]
        assert all((got[name][:4] - without[name][:4]).abs().max() > 1e-6 for name in gates)


def test_a_fresh_stack_whose_delta_is_zero_is_balanced_already() -> None:
    model = wrap(r=2, num_experts=4, top_k=2, balance_coef=0.1)
    model.train()
    got = step(model, tokens())
    assert all(got[name][:4].abs().max() > 0 for name in got if "brainstacks_A" in name)


def test_checkpointing_draws_the_same_noise_again() -> None:
    model = wrap(r=2, num_experts=4, top_k=2, noisy_gate=True, balance_coef=0.1)
    revive(model)
    model.train()
    model.enable_input_require_grads()
    ids = tokens()
    expected = step(model, ids)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step(model, ids)
        for name, gradient in expected.items():
            assert_near(got[name], gradient, 1e-4, f"{name}, reentrant {reentrant}")


def test_noise_in_training_only() -> None:
    model = wrap(r=2, num_experts=4, top_k=2, noisy_gate=True)
    revive(model)
    ids = tokens()
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    for layer in layers_of(model):
        layer.configs["default"].noisy_gate = False
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_statistics_are_the_mean_use_and_balance_over_training_forwards() -> None:
    model = wrap(r=2, num_experts=4, top_k=2, noisy_gate=False, balance_coef=0.1)
    model.train()
    seen: dict[BrainstacksLayer, list[Tensor]] = {layer: [] for layer in layers_of(model)}
    for layer in seen:
        layer.register_forward_hook(lambda layer, x, _: seen[layer].append(x[0].detach()))
    for _ in range(3):
        model(input_ids=tokens())
    with torch.no_grad():
        model(input_ids=tokens())
    for layer, inputs in seen.items():
        assert layer.statistics is not None and float(layer.statistics[-1]) == 3
        uses, losses = [], []
        for x in inputs[:3]:
            logits = x @ layer.brainstacks_A["default"].weight[:4].T
            uses.append(expert_use(top_k_gates(logits, 2), 2))
            losses.append(float(reference_balance(logits, 2).detach()))
        torch.testing.assert_close(layer.statistics[:4], torch.stack(uses).sum(0), rtol=1e-5, atol=1e-6)
        assert float(layer.statistics[4]) == pytest.approx(sum(losses), rel=1e-5)
