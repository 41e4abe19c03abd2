"""The null space, against dense projectors and singular values of explicitly collected deltas, in float64."""

from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from support.wrapped import TINY, assert_near, freeze, layers_of, revive, tuner_of, wrap
from torch import Tensor

from axolotl_brainstacks.adapter import BrainstacksLinear
from axolotl_brainstacks.adapter.nullspace import RankGram, fit_directions, leakage, project_out
from axolotl_brainstacks.calibration import (
    Calibration,
    Energy,
    capacity,
    energy_within,
    fit_columns,
    measure,
    merge_columns,
)
from axolotl_brainstacks.evaluation import Example


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def projector(columns: Tensor) -> Tensor:
    """The dense projector onto the span of orthonormal columns."""
    return columns.double() @ columns.double().T


# Projection


def test_project_out_equals_the_dense_projector_and_so_does_its_gradient() -> None:
    weight = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    basis, upstream = orthonormal(30, 7), torch.randn(30, 12, dtype=torch.float64)
    complement = torch.eye(30, dtype=torch.float64) - projector(basis)
    got = project_out(weight, basis)
    torch.testing.assert_close(got, complement @ weight, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad((got * upstream).sum(), weight)
    torch.testing.assert_close(gradient, complement @ upstream, rtol=1e-12, atol=1e-12)


def test_project_out_loses_nothing_to_a_narrow_dtype_or_autocast() -> None:
    weight, basis = torch.randn(30, 12, dtype=torch.bfloat16), orthonormal(30, 7).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = project_out(weight, basis)
    assert got.dtype == torch.float32
    assert leakage(got, basis) < 1e-6


def test_leakage_is_the_share_of_the_norm_along_the_basis() -> None:
    basis = orthonormal(20, 5)
    inside, outside = basis @ torch.randn(5, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    outside = outside - projector(basis) @ outside
    assert leakage(inside, basis) == pytest.approx(1.0)
    assert leakage(outside, basis) < 1e-14
    expected = float(inside.norm() / (inside + outside).norm())
    assert leakage(inside + outside, basis) == pytest.approx(expected)
    assert leakage(torch.zeros(20, 3), basis) == 0.0


def protect(model: PeftModel, columns: int) -> dict[str, Tensor]:
    bases = {layer.module_name: orthonormal(layer.out_features, columns).float() for layer in layers_of(model)}
    tuner_of(model).set_null_space("default", bases)
    return bases


def test_a_stack_trained_with_adamw_has_nothing_along_the_basis() -> None:
    model = wrap(noisy_gate=True, balance_coef=0.01)
    bases = protect(model, 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    ids = torch.randint(0, TINY["vocab_size"], (4, 9))
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tensors = tuner_of(model).export_stack("default")
    raw = []
    for layer in layers_of(model):
        basis = bases[layer.module_name]
        raw.append(leakage(layer.brainstacks_B["default"].weight.detach(), basis))
        folded = tensors[f"base_model.model.{layer.module_name}.brainstacks_B.weight"]
        assert folded.dtype == torch.float32 and folded.any()
        assert leakage(folded, basis) < 1e-6
    assert max(raw) > 1e-2, "AdamW keeps the raw B off the basis by itself, so this test shows nothing"


def test_the_fold_does_not_leak_when_hardly_anything_is_left() -> None:
    model = wrap()
    bases = protect(model, 5)
    for layer in layers_of(model):
        basis, b = bases[layer.module_name], layer.brainstacks_B["default"].weight
        b.data = basis @ torch.randn(5, b.shape[1]) + 1e-3 * torch.randn_like(b)
        assert leakage(layer.export_stack("default")[1], basis) < 1e-6


def test_a_protected_stack_is_one_function_in_training_evaluation_and_when_frozen() -> None:
    model = wrap(noisy_gate=False, balance_coef=0.0)
    bases = protect(model, 5)
    revive(model)
    ids = torch.randint(0, TINY["vocab_size"], (2, 9))
    deltas = dict.fromkeys(layers_of(model), torch.empty(0))
    hooks = [
        layer.register_forward_hook(lambda layer, x, y: deltas.update({layer: y - layer.base_layer(x[0])}))
        for layer in deltas
    ]
    training = model.train()(input_ids=ids).logits
    for layer, delta in deltas.items():
        assert delta.abs().max() > 1e-3
        assert leakage(delta.detach().flatten(0, 1).T, bases[layer.module_name]) < 1e-5
    evaluation = model.eval()(input_ids=ids).logits
    assert torch.equal(training, evaluation)
    for hook in hooks:
        hook.remove()

    tuner = tuner_of(model)
    tuner.attach_stack("s001_chat", "chat", model.peft_config["default"], tuner.export_stack("default"))
    with model.disable_adapter():
        assert_near(model(input_ids=ids).logits, evaluation, 1e-4)


def test_projections_without_columns_and_an_empty_null_space_are_free() -> None:
    model = wrap()
    revive(model)
    first, *rest = layers_of(model)
    tuner_of(model).set_null_space("default", {first.module_name: orthonormal(first.out_features, 2)})
    assert first.brainstacks_B["default"].basis.dtype == torch.float32
    assert all(layer.brainstacks_B["default"].basis is None for layer in rest)
    assert not any("basis" in key for key in model.state_dict())
    tuner_of(model).set_null_space("default", {})
    assert torch.equal(first.export_stack("default")[1], first.brainstacks_B["default"].weight)


# Fitting one projection


def explicit_fit(deltas: Tensor, held: Tensor, directions: int) -> tuple[Tensor, float, float]:
    """From all weighted deltas (tokens, out): columns to add by SVD, energy of old and new columns, energy in all."""
    rest = deltas - deltas @ projector(held)
    _, values, vectors = torch.linalg.svd(rest, full_matrices=False)
    count = min(directions, int((values > values.max() * 1e-4).sum()) if values.max() > 0 else 0)
    columns = vectors[:count].T
    union = projector(held) + projector(columns)
    return columns, float((deltas @ union).square().sum()), float(deltas.square().sum())


@pytest.mark.parametrize("held_columns", [0, 6])
@pytest.mark.parametrize("directions", [1, 4, 9])
def test_fit_directions_equals_the_svd_of_the_delta_matrix(held_columns: int, directions: int) -> None:
    z = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, -1.5, 12, dtype=torch.float64)
    output, held = torch.randn(12, 30, dtype=torch.float64), orthonormal(30, held_columns)
    fit = fit_directions(z.T @ z, output, held if held_columns else None, directions)
    columns, captured, total = explicit_fit(z @ output, held, directions)
    assert fit.columns.dtype == torch.float32 and fit.columns.shape == (30, directions)
    torch.testing.assert_close(projector(fit.columns), projector(columns), rtol=0, atol=1e-5)
    assert fit.total == pytest.approx(total, rel=1e-9)
    assert fit.captured == pytest.approx(captured, rel=1e-9)
    union = torch.cat([held.float(), fit.columns], dim=1)
    torch.testing.assert_close(union.T @ union, torch.eye(union.shape[1]), rtol=0, atol=1e-6)


def test_fit_directions_adds_no_more_than_the_deltas_have() -> None:
    z = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    output = torch.randn(12, 30, dtype=torch.float64)
    fit = fit_directions(z.T @ z, output, None, 10)
    assert fit.columns.shape == (30, 3)
    assert fit.captured == pytest.approx(fit.total, rel=1e-9)
    again = fit_directions(z.T @ z, output, fit.columns, 10)
    assert again.columns.shape == (30, 0)
    assert again.captured == pytest.approx(again.total, rel=1e-6)
    nothing = fit_directions(torch.zeros(12, 12), output, None, 10)
    assert nothing.columns.shape == (30, 0) and nothing.captured == nothing.total == 0.0


def test_fit_directions_stops_when_the_output_space_is_full() -> None:
    z, output = torch.randn(50, 12), torch.randn(12, 5)
    held = orthonormal(5, 3)
    fit = fit_directions(z.T @ z, output, held, 10)
    assert fit.columns.shape == (5, 2)
    union = torch.cat([held.float(), fit.columns], dim=1)
    torch.testing.assert_close(union @ union.T, torch.eye(5), rtol=0, atol=1e-5)
    full = fit_directions(z.T @ z, output, union, 10)
    assert full.columns.shape == (5, 0) and full.captured == pytest.approx(full.total, rel=1e-6)


def test_the_moments_are_weighted_sums_also_under_autocast() -> None:
    z, weights = torch.randn(3, 4, 6), torch.rand(3, 4) * (torch.rand(3, 4) > 0.3)
    gram = RankGram()
    with torch.autocast("cpu", torch.bfloat16):
        gram.add(z[:2], weights[:2])
        gram.add(z[2:], weights[2:])
    expected = torch.einsum("bt,btr,bts->rs", weights.double(), z.double(), z.double())
    assert gram.total is not None
    assert_near(gram.total, expected, 1e-6)


# Fitting a model


def some_rows(lengths: list[int]) -> list[Example]:
    rows = [torch.randint(1, TINY["vocab_size"], (length,)).tolist() for length in lengths]
    return [Example(ids, [-100, *ids[1:]]) for ids in rows]


@torch.no_grad()
def explicit_deltas(model: PeftModel, stacks: list[str], rows: list[Example]) -> dict[str, Tensor]:
    """Per projection, what the stacks add to every token, (tokens, out): each row on its own, scaled to count alike."""
    found: dict[str, list[Tensor]] = {}

    def collect(layer: BrainstacksLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        delta = (output - layer.base_layer(inputs[0]))[0].double()
        found.setdefault(layer.module_name, []).append(delta / len(delta) ** 0.5)

    hooks = [layer.register_forward_hook(collect) for layer in layers_of(model)]
    model.eval()
    with tuner_of(model).using_stacks(stacks), model.disable_adapter():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Fitted:
    columns: dict[str, Tensor]
    energy: Energy
    left: dict[str, float]


def fit(model: PeftModel, part: Calibration, held: dict[str, Tensor], directions: int, batch: int = 3) -> Fitted:
    """As for a domain that gets its columns: what it uses beyond `held`, and what the union is worth."""
    tuner = tuner_of(model)
    moments = measure(model, tuner, part, batch)
    columns = fit_columns(tuner, moments, held, directions)
    union = merge_columns([held, columns])
    return Fitted(columns, energy_within(tuner, moments, union), capacity(tuner, union))


@pytest.mark.parametrize("stacks", [["s001_chat", "s002_chat"], ["s001_chat", "s002_chat", "s003_code"]])
def test_fitted_columns_equal_the_svd_of_deltas_collected_through_hooks(stacks: list[str]) -> None:
    model = wrap(noisy_gate=False)
    freeze(model, ["s001_chat", "s002_chat", "s003_code"])
    part = Calibration(some_rows([4, 17, 9, 9, 2]), stacks)
    held = {layer.module_name: orthonormal(layer.out_features, 2).float() for layer in layers_of(model)[::2]}

    model.train()
    got = fit(model, part, held, directions=4)

    explicit = explicit_deltas(model, part.stacks, part.rows)
    captured = total = 0.0
    for layer in layers_of(model):
        name = layer.module_name
        deltas = explicit[name] / len(part.rows) ** 0.5
        old = held.get(name, torch.empty(layer.out_features, 0))
        _, part_captured, part_total = explicit_fit(deltas, old, 4)
        captured, total = captured + part_captured, total + part_total
        new = got.columns[name]
        assert new.shape == (layer.out_features, 4)
        # Neighbouring singular values may be close, and then the last direction is a matter of rounding; energy is not.
        union = torch.cat([old.double(), new.double()], dim=1)
        torch.testing.assert_close(union.T @ union, torch.eye(union.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)
        assert float((deltas @ projector(union)).square().sum()) == pytest.approx(part_captured, rel=1e-4)
    assert (got.energy.captured, got.energy.total) == pytest.approx((captured, total), rel=1e-4)
    assert 0 < got.energy.share < 1
    assert got.left == pytest.approx(
        {
            layer.module_name: 1 - (6 if layer.module_name in held else 4) / layer.out_features
            for layer in layers_of(model)
        }
    )


def test_without_rows_the_leading_singular_vectors_of_b_are_fitted() -> None:
    """In the ratio of their stacks' output scales, (alpha / sqrt(r))^2."""
    model = wrap(num_experts=1, top_k=1, noisy_gate=False)
    freeze(model, ["s001_sums", "s002_sums"])
    got = fit(model, Calibration([], ["s001_sums", "s002_sums"]), {}, 3)
    for layer in layers_of(model):
        (segment,) = layer.bank._segments()
        outputs = segment.outputs.flatten(0, 1).double().T * segment.shape.scaling
        left, values, _ = torch.linalg.svd(outputs, full_matrices=False)
        assert values[2] > 1.001 * values[3]
        columns = got.columns[layer.module_name]
        torch.testing.assert_close(projector(columns), projector(left[:, :3]), rtol=0, atol=1e-4)


def test_fitting_leaves_the_model_as_it_was() -> None:
    model = wrap()
    freeze(model, ["s001_chat", "s002_code"])
    tuner = tuner_of(model)
    tuner.use_stacks(["s002_code"])
    ids = torch.randint(0, TINY["vocab_size"], (1, 7))
    before = model.eval()(input_ids=ids).logits
    for training in (True, False):
        model.train(training)
        fit(model, Calibration(some_rows([5]), ["s001_chat"]), {}, 2)
        assert model.training is training
        assert all(layer.training is training and layer.bank.observer is None for layer in layers_of(model))
        assert all(not layer.disable_adapters for layer in layers_of(model))
        assert all(p.requires_grad == ("brainstacks_" in name) for name, p in model.named_parameters())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_batches_and_lengths_do_not_matter() -> None:
    model = wrap()
    freeze(model, ["s001_chat", "s002_chat"])
    short, long = some_rows([3, 3]), some_rows([40])
    stacks = ["s001_chat", "s002_chat"]
    energies = [fit(model, Calibration(short + long, stacks), {}, 3, batch).energy.share for batch in (1, 2, 3)]
    assert energies == pytest.approx([energies[0]] * 3, rel=1e-5)
    # Each sample has weight one: what a long row adds to a moment is the mean over its tokens, not their sum.
    name = layers_of(model)[0].module_name
    deltas = {kind: explicit_deltas(model, stacks, rows)[name] for kind, rows in (("s", short), ("l", long))}
    assert [len(part) for part in deltas.values()] == [6, 40]
    columns = fit(model, Calibration(short + long, stacks), {}, 3).columns[name]
    weighted, _, _ = explicit_fit(torch.cat([deltas["s"], deltas["l"]]), torch.empty(columns.shape[0], 0), 3)
    unweighted, _, _ = explicit_fit(
        torch.cat([deltas["s"] * 3**0.5, deltas["l"] * 40**0.5]), torch.empty(columns.shape[0], 0), 3
    )
    off = (projector(columns) - projector(weighted)).norm()
    assert off < 1e-3 < (projector(columns) - projector(unweighted)).norm()


def test_a_projection_that_no_stack_covers_gets_no_columns() -> None:
    model = wrap(target_modules=["q_proj", "down_proj"])
    freeze(model, ["s001_chat"])
    got = fit(model, Calibration(some_rows([6]), ["s001_chat"]), {}, 2)
    assert {name.rpartition(".")[2] for name in got.columns} == {"q_proj", "down_proj"}


def test_all_energy_is_captured_by_enough_directions() -> None:
    model = wrap(r=1, num_experts=3)
    freeze(model, ["s001_chat"])
    got = fit(model, Calibration(some_rows([20, 30]), ["s001_chat"]), {}, 100)
    assert got.energy.share == pytest.approx(1.0, abs=1e-6)
    assert {columns.shape[1] for columns in got.columns.values()} == {3}


def test_no_direction_left_is_an_error_that_names_the_projection_and_the_key() -> None:
    model = wrap(r=8, num_experts=4)
    freeze(model, ["s001_chat"])
    with pytest.raises(ValueError, match=r"[kv]_proj.*brainstacks\.null_space\.directions"):
        fit(model, Calibration(some_rows([30, 30]), ["s001_chat"]), {}, 16)


def test_columns_of_several_domains_are_joined_in_order() -> None:
    a, b, c = torch.randn(5, 2), torch.randn(5, 1), torch.randn(3, 1)
    joined = merge_columns([{"x": a}, {"x": b, "y": c}])
    assert torch.equal(joined["x"], torch.cat([a, b], dim=1)) and torch.equal(joined["y"], c)
    assert merge_columns([]) == {}
