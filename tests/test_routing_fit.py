from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.routed import random_rows
from support.seeds import seeded_random
from torch import Tensor

from axolotl_brainstacks.evaluation import IGNORED, Example
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.data import MIXED, Sample
from axolotl_brainstacks.router_training.fit import Prompts, Score, fit, objective, probabilities, target
from axolotl_brainstacks.router_training.split import joined, joined_in_parts, split

CPU = torch.device("cpu")
DOMAINS = ["chat", "code", "reasoning"]


def test_targets_blend_what_was_discovered_with_the_label() -> None:
    losses = {(): 2.0, ("chat",): 1.5, ("code",): 2.5, ("reasoning",): 1.999}
    assert target(losses, ("chat",), ["code"], DOMAINS, RouterArgs()) == pytest.approx([0.8, 0.2, 0.0])
    assert target(losses, ("chat",), ["chat"], DOMAINS, RouterArgs(label_blend=0.5)) == pytest.approx([1.0, 0, 0])
    assert target(losses, (), [], DOMAINS, RouterArgs()) == [0, 0, 0], "a prompt of no domain is not blended"


def test_a_soft_domain_counts_half_when_adding_it_to_the_best_set_helps_at_all() -> None:
    args = RouterArgs(soft_domains=["code", "reasoning"], label_blend=0)
    losses = {(): 2.0, ("chat",): 1.5, ("chat", "code"): 1.495, ("chat", "reasoning"): 1.6}
    # Alone, it is the other way round: code harms and reasoning helps.
    losses |= {("code",): 2.5, ("reasoning",): 1.9}
    assert target(losses, ("chat",), ["chat"], DOMAINS, args) == [1, 0.5, 0]
    assert target(losses | {("chat", "code"): 1.5}, ("chat",), ["chat"], DOMAINS, args) == [1, 0, 0]
    losses |= {("code", "reasoning"): 1.0, ("chat", "code", "reasoning"): 0.9}
    assert target(losses, ("code", "reasoning"), ["chat"], DOMAINS, args) == [0, 1, 1], "chat is not soft"


def test_the_objective_is_bce_and_a_hinge_on_undecided_probabilities() -> None:
    logits, targets = torch.randn(6, 3) * 2, torch.rand(6, 3)
    p = logits.sigmoid()
    bce = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    hinge = sum(max(0.0, 0.3 - abs(float(value) - 0.5)) for value in p.flatten()) / p.numel()
    assert float(objective(logits, targets, RouterArgs())) == pytest.approx(float(bce) + 0.05 * hinge, rel=1e-4)


def test_scores() -> None:
    targets = torch.tensor([[0.8, 0.2, 0.8], [0.2, 0.0, 0.0], [0.0, 1.0, 0.5]])
    predicted = torch.tensor([[0.1, 0.2, 0.9], [0.4, 0.3, 0.1], [0.0, 0.3, 0.7]])
    score = Score.of(predicted, targets)
    assert score.top1 == pytest.approx(2 / 3), "either of two equal targets is right"
    assert score.set_match == pytest.approx(1 / 3)
    assert score.bce == pytest.approx(float(F.binary_cross_entropy(predicted, targets)))
    assert score.total((0.5, 0.35, -0.15)) == pytest.approx(1 / 3 + 0.35 / 3 - 0.15 * score.bce)


def toy(count: int, directions: Tensor) -> Prompts:
    """Prompts of random tokens, one of which says which domains help: separable, wherever it stands."""
    features, targets = [], []
    for _ in range(count):
        helps = torch.randint(2, (len(directions),)).float()
        tokens = torch.randn(int(torch.randint(3, 12, ())), directions.shape[1])
        tokens[int(torch.randint(len(tokens), ()))] += 12 * (helps * 2 - 1) @ directions
        features.append(tokens)
        targets.append(helps)
    return Prompts(features, torch.stack(targets))


def fresh(seed: int = 3) -> Router:
    return Router.fresh(
        RouterConfig(domains=DOMAINS, features=24, width=32, dropout=0.1, gate=RouterArgs().gate()), seed
    )


def test_a_separable_task_is_learnt_and_generalises() -> None:
    directions = torch.linalg.qr(torch.randn(24, 3)).Q.T
    router = fresh()
    train, validation, test = toy(400, directions), toy(60, directions), toy(60, directions)
    before = Score.of(probabilities(router, test, 16, CPU), test.targets)
    scores = fit(router, train, validation, RouterArgs(learning_rate=4e-3), CPU)
    after = Score.of(probabilities(router, test, 16, CPU), test.targets)
    assert len(scores) == 8
    assert before.set_match < 0.5 and after.set_match > 0.9 and after.bce < 0.2


def test_the_epoch_with_the_best_score_is_kept() -> None:
    directions = torch.linalg.qr(torch.randn(24, 3)).Q.T
    validation, router, args = toy(30, directions), fresh(), RouterArgs(learning_rate=0.05, max_grad_norm=100)
    scores = fit(router, toy(100, directions), validation, args, CPU)
    kept = Score.of(probabilities(router, validation, 16, CPU), validation.targets)
    totals = [score.total(args.score) for score in scores]
    assert kept.total(args.score) == pytest.approx(max(totals), abs=1e-6) and max(totals) > min(totals)


def test_the_same_seed_gives_the_same_router() -> None:
    directions = torch.randn(3, 24)
    train, validation = toy(40, directions), toy(10, directions)

    def weights(seed: int) -> dict[str, Tensor]:
        router = fresh(seed)
        torch.rand(seed)  # the global state must not matter, nor be changed
        state = torch.get_rng_state()
        fit(router, train, validation, RouterArgs(seed=seed, epochs=2), CPU)
        assert torch.equal(torch.get_rng_state(), state)
        return router.network.state_dict()

    one, again, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def samples_of(source: str, rows: list[Example]) -> list[Sample]:
    return [Sample(row, source, (source,)) for row in rows]


def with_answer(row: Example, rng: Random) -> Example:
    """Another answer to the same prompt."""
    answer = [rng.randrange(90) for _ in range(5)]
    return Example(row.prompt_ids + answer, [IGNORED] * len(row.prompt_ids) + answer)


def test_no_prompt_is_on_two_sides_of_the_split() -> None:
    rng = seeded_random()
    for _ in range(20):
        rows = random_rows(60, rng)
        twins = [with_answer(rng.choice(rows), rng) for _ in range(60)]
        shared = [with_answer(rng.choice(rows), rng) for _ in range(30)]
        samples = samples_of("chat", rows + twins) + samples_of("code", random_rows(30, rng) + shared)
        parts = split(samples, RouterArgs(seed=rng.randrange(1000)))
        sides: dict[tuple[int, ...], set[str]] = {}
        for sample, part in zip(samples, parts, strict=True):
            sides.setdefault(tuple(sample.row.prompt_ids), set()).add(part)
        assert len(sides) < len(samples) and all(len(side) == 1 for side in sides.values())
        for source in ("chat", "code"):
            found = {part for sample, part in zip(samples, parts, strict=True) if sample.source == source}
            assert found == {"train", "validation", "test"}


def test_the_split_has_the_shares_asked_for_and_follows_the_seed() -> None:
    samples = samples_of("chat", random_rows(200, seeded_random()))
    args: dict[str, Any] = {"test_share": 0.2, "validation_share": 0.1}
    parts = split(samples, RouterArgs(**args, seed=1))
    prompts = {tuple(sample.row.prompt_ids): part for sample, part in zip(samples, parts, strict=True)}
    counts = Counter(prompts.values())
    assert counts["test"] == round(0.2 * len(prompts)) and counts["validation"] == round(0.1 * len(prompts))
    assert split(samples, RouterArgs(**args, seed=1)) == parts != split(samples, RouterArgs(**args, seed=2))


def test_too_few_prompts_to_split() -> None:
    row = random_rows(1, seeded_random())[0]
    rows = [row, *random_rows(1, seeded_random()), *(with_answer(row, seeded_random()) for _ in range(20))]
    with pytest.raises(
        ValueError, match=r"`chat` has 2 different held-out prompts, too few .*router_datasets.*val_set_size"
    ):
        split(samples_of("chat", rows), RouterArgs())


def test_every_part_has_joined_prompts_of_its_own() -> None:
    rng = Random(7)
    samples = samples_of("chat", random_rows(60, rng)) + samples_of("code", random_rows(60, rng))
    parts = split(samples, RouterArgs())
    pairs, theirs = joined_in_parts(samples, parts, 20, seed=3)
    assert Counter(theirs) == {"train": 14, "validation": 3, "test": 3}, "in proportion to the parts"
    assert (pairs, theirs) == joined_in_parts(samples, parts, 20, seed=3)
    prompts = {part: [s for s, other in zip(samples, parts, strict=True) if other == part] for part in set(parts)}
    for pair, part in zip(pairs, theirs, strict=True):
        assert any(
            one.row.prompt_ids + other.row.prompt_ids == pair.row.prompt_ids and one.source != other.source
            for one in prompts[part]
            for other in prompts[part]
        ), "not made of two prompts of its part"
    for count in (0, 1, 2, 32):
        assert len(joined_in_parts(samples, parts, count, seed=3)[0]) == count


def test_joined_prompts_ask_both_questions_and_want_both_answers() -> None:
    rng = seeded_random()
    single = samples_of("chat", random_rows(5, rng)) + samples_of("code", random_rows(5, rng))
    pairs = joined(single, 12, seed=3)
    assert len(pairs) == 12 and joined(single, 12, seed=3) == pairs
    by_row = {tuple(sample.row.input_ids): sample for sample in single}
    for pair in pairs:
        assert pair.source == MIXED and set(pair.labels) == {"chat", "code"}
        assert [t for t in pair.row.labels if t != IGNORED] == pair.row.input_ids[len(pair.row.prompt_ids) :]
        matches = [
            (a, b)
            for a in by_row.values()
            for b in by_row.values()
            if a.row.prompt_ids + b.row.prompt_ids == pair.row.prompt_ids and a.labels + b.labels == pair.labels
        ]
        assert matches, "the prompt is not two prompts of the two domains"
        a, b = matches[0]
        answers = a.row.input_ids[len(a.row.prompt_ids) :] + b.row.input_ids[len(b.row.prompt_ids) :]
        assert pair.row.input_ids == pair.row.prompt_ids + answers
    assert joined(samples_of("chat", random_rows(5, rng)), 12, seed=3) == [], "one domain has no mixed prompts"
