"""Gates and the load balance, against plain float64 formulas; the injected gradient, against the explicit loss."""

import math

import pytest
import torch
from peft import PeftModel
from support.wrapped import TINY, assert_near, layers_of, revive, wrap
from torch import Tensor

from axolotl_brainstacks.adapter.gating import BatchTokens, Gating, gated, top_k_gates
from axolotl_brainstacks.adapter.layer import BrainstacksLinear

SHAPES = [(1, 1), (2, 1), (4, 2), (5, 3), (4, 4)]


@pytest.mark.parametrize("experts,k", SHAPES)
def test_gates_are_the_softmax_of_the_k_largest_logits(experts: int, k: int) -> None:
    logits = torch.randn(3, 7, experts, dtype=torch.float64) * 3
    gates, _ = top_k_gates(logits, k)
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
        gates, _ = top_k_gates(logits, k)
        assert gates.dtype == dtype and gates.shape == logits.shape
        assert ((gates != 0).sum(-1) == k).all()
        torch.testing.assert_close(gates.float().sum(-1), torch.ones(2, 50), rtol=0, atol=1e-2)


def test_the_gates_gradient_is_exact() -> None:
    # Far from ties the choice of experts is locally constant, so the gates are smooth.
    logits = torch.stack([torch.randperm(5).double() + 0.3 * torch.rand(5).double() for _ in range(6)])
    logits.requires_grad_()
    for k in (1, 2, 3, 5):
        assert torch.autograd.gradcheck(lambda x, k=k: top_k_gates(x, k)[0], logits)


def reference_balance(logits: Tensor, k: int, real: Tensor | None = None) -> Tensor:
    """N * sum_e P(e) f(e), token by token, over those of the mask `real`."""
    tokens = logits.flatten(0, -2)
    if real is not None:
        tokens = tokens[real.flatten().bool()]
    experts = tokens.shape[-1]
    total = tokens.new_zeros(())
    for e in range(experts):
        p = sum(token.softmax(0)[e] for token in tokens) / len(tokens)
        f = sum(e in token.topk(k).indices.tolist() for token in tokens) / len(tokens)
        total = total + p * f
    return experts * total


def reference_gated(h: Tensor, gating: Gating, weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z and the balance loss, expert by expert."""
    n, r = gating.n, gating.r
    logits = h[..., :n]
    if gating.noisy:
        logits = logits + torch.log1p(h[..., n : 2 * n].exp()) * noise
    kept = logits.topk(gating.k).indices
    hidden = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
    gates = logits.masked_fill(hidden, -torch.inf).softmax(-1) * gating.scaling * weights
    lead = 2 * n if gating.noise_rows else n
    parts = [gates[..., e : e + 1] * h[..., lead + e * r : lead + (e + 1) * r] for e in range(n)]
    return torch.cat(parts, dim=-1).flatten(-2), reference_balance(logits, gating.k)


@pytest.mark.parametrize("experts,k", SHAPES)
@pytest.mark.parametrize("noise_rows,noisy,balance", [(False, False, None), (True, False, 0.3), (True, True, 0.7)])
@pytest.mark.parametrize("stacks", [1, 3])
def test_values_and_gradients_equal_the_plain_formulas(
    experts: int, k: int, noise_rows: bool, noisy: bool, balance: float | None, stacks: int
) -> None:
    gating = Gating(experts, 3, k, 1.7, noise_rows, noisy, balance)
    # 2 x 19 tokens cannot be shared evenly by most; where they are, the balance has no gradient and should have none.
    h = torch.randn(2, 19, stacks, experts * (2 if noise_rows else 1) + experts * 3, dtype=torch.float64)
    h.requires_grad_()
    weights = torch.rand(2, 1, stacks, 1, dtype=torch.float64) * (torch.rand(2, 1, stacks, 1) > 0.3)
    weights[0, 0, 0] = 1.0
    seed = torch.seed()
    z, counts = gated(h, gating, weights)
    upstream = torch.randn_like(z)
    torch.manual_seed(seed)
    expected, loss = reference_gated(h, gating, weights, torch.randn(2, 19, stacks, experts, dtype=torch.float64))
    assert_near(z, expected, 1e-12)
    if balance is None:
        assert counts.numel() == 0
    else:
        assert float(counts[experts]) == pytest.approx(float(loss.detach()), rel=1e-10) and counts[-1] == 1
        assert float(counts[:experts].sum()) == pytest.approx(1)
    got = torch.autograd.grad((z * upstream).sum(), h)[0]
    assert_near(got, torch.autograd.grad((expected * upstream).sum() + (balance or 0) * loss, h)[0], 1e-10)


def test_padding_does_not_count_in_the_balance() -> None:
    gating, h = Gating(4, 3, 2, 1.0, balance=0.5), torch.randn(3, 11, 1, 16, dtype=torch.float64, requires_grad=True)
    real = torch.arange(11)[None] < torch.tensor([11, 4, 6])[:, None]
    batch = BatchTokens()
    batch.set_mask(real.long() * 2)
    assert batch.share_of(torch.empty(3, 10, 5)) is None
    share = batch.share_of(torch.empty(3, 11, 5))
    assert share is not None
    z, counts = gated(h, gating, share=share.double())
    expected = reference_balance(h[..., :4], 2, real)
    assert float(counts[4]) == pytest.approx(float(expected.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad((z * 0).sum(), h)
    assert_near(gradient, torch.autograd.grad(0.5 * expected, h)[0], 1e-6)
    assert not gradient[~real].any()


def test_the_upstream_gradient_does_not_scale_the_balance() -> None:
    h = torch.randn(1, 19, 1, 8 + 8, dtype=torch.float64, requires_grad=True)
    z, _ = gated(h, Gating(4, 2, 2, 1.0, noise_rows=True, balance=0.5))
    # As at a fresh stack, whose B is zero.
    (got,) = torch.autograd.grad((z * 0).sum(), h)
    (expected,) = torch.autograd.grad(0.5 * reference_balance(h[..., :4], 2), h)
    assert_near(got, expected, 1e-10)
    assert expected.abs().max() > 1e-6


def test_bf16_is_as_near_to_the_truth_as_the_plain_formulas() -> None:
    gating = Gating(4, 16, 2, 4.0)
    exact = torch.randn(4, 64, 2, 4 + 64).bfloat16().double().requires_grad_()
    rounded = exact.detach().bfloat16().requires_grad_()
    plain = exact.detach().bfloat16().requires_grad_()
    upstream = torch.randn(4, 64, 128).bfloat16()
    ones = torch.ones((), dtype=torch.float64)
    expected, _ = reference_gated(exact, gating, ones, ones)
    z, _ = gated(rounded, gating)
    gates = (top_k_gates(plain[..., :4].float(), 2)[0] * 4.0).bfloat16().unsqueeze(-1)
    plain_z = (plain[..., 4:].unflatten(-1, (4, 16)) * gates).flatten(-3)

    def error(value: Tensor, truth: Tensor) -> float:
        return float((value.detach().double() - truth).norm() / truth.norm())

    assert error(z, expected) <= 1.05 * error(plain_z, expected)
    (truth,) = torch.autograd.grad((expected * upstream.double()).sum(), exact)
    (got,) = torch.autograd.grad((z * upstream).sum(), rounded)
    (other,) = torch.autograd.grad((plain_z * upstream).sum(), plain)
    assert error(got, truth) <= 1.05 * error(other, truth)


def test_noise_is_gaussian_with_a_softplus_scale() -> None:
    # Two experts, both on: z of the first is its gate, and its logit relative to the other follows from it.
    logits, scales = torch.randn(2), torch.randn(2)
    h = torch.cat([logits, scales, torch.ones(2)]).expand(40_000, 1, 6)
    z, _ = gated(h, Gating(2, 1, 2, 1.0, noise_rows=True, noisy=True))
    drawn = torch.logit(z[:, 0].double())
    deviation = float(torch.log1p(scales.exp()).norm())
    assert float(drawn.mean()) == pytest.approx(float(logits[0] - logits[1]), abs=6 * deviation / 200)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.03)


def test_balance_is_one_when_balanced_and_n_when_one_expert_gets_all() -> None:
    gating = Gating(4, 1, 1, 1.0, balance=0.1)
    for logits, loss in ((50 * torch.eye(4), 1.0), (torch.tensor([[50.0, 0, 0, 0]] * 8), 4.0)):
        _, counts = gated(torch.cat([logits, torch.ones_like(logits)], dim=-1).unsqueeze(1), gating)
        assert float(counts[4]) == pytest.approx(loss)


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

    def collect(layer: BrainstacksLinear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
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


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_models_padding_changes_no_gradient(reentrant: bool | None) -> None:
    model = wrap(r=2, num_experts=4, top_k=2, noisy_gate=False, balance_coef=0.5)
    revive(model)
    model.double()  # attention with a mask rounds otherwise than without, by up to 2e-4 of a gradient in fp32
    model.train()
    model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens()
    expected = step(model, ids)
    padded, mask = (
        torch.cat([ids, torch.zeros_like(ids)], 1),
        torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    )
    model.zero_grad()
    labels = padded.masked_fill(mask == 0, -100)
    model(input_ids=padded, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        assert_near(gradients(model)[name], gradient, 1e-5, name)


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
    seen: dict[BrainstacksLinear, list[Tensor]] = {layer: [] for layer in layers_of(model)}
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
            uses.append((top_k_gates(logits, 2)[0] != 0).flatten(0, -2).float().mean(0) / 2)
            losses.append(float(reference_balance(logits, 2).detach()))
        torch.testing.assert_close(layer.statistics[:4], torch.stack(uses).sum(0), rtol=1e-5, atol=1e-6)
        assert float(layer.statistics[4]) == pytest.approx(sum(losses), rel=1e-5)
