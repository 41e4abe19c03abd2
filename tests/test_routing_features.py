from pathlib import Path

import pytest
import torch
from support.routed import VOCABULARY, meter_of, new_library, tiny_base
from support.seeds import seeded_random
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from axolotl_brainstacks.router.features import base_features
from axolotl_brainstacks.router.network import OutcomeRouter
from axolotl_brainstacks.router_training.measure import LossMeter


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_base()


@pytest.fixture(scope="module")
def meter(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> LossMeter:
    return meter_of(new_library(tmp_path_factory.mktemp("features") / "library", base, ["chat", "code"]), base)


def expected(base: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The paper's features of one unpadded prompt, by the whole model."""
    with torch.no_grad():
        layers = base(input_ids=tokens.unsqueeze(0), output_hidden_states=True).hidden_states
    return (0.45 * layers[2] + 0.55 * layers[4])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_are_the_base_models_whatever_the_padding(base: PreTrainedModel, meter: LossMeter, side: str) -> None:
    prompts = [torch.randint(VOCABULARY, (length,)) for length in (3, 11, 7)]
    ids, given = torch.randint(VOCABULARY, (3, 12)), torch.zeros(3, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(12 - len(prompt), 12) if side == "left" else slice(0, len(prompt))
        ids[row, place], given[row, place] = prompt, 1
    hidden, mask = base_features(meter.model, meter.tuner, ids, given)
    assert mask.tolist() == [[i < len(prompt) for i in range(11)] for prompt in prompts]
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(hidden[row, : len(prompt)], expected(base, prompt), atol=1e-5, rtol=1e-5)


def test_of_a_long_prompt_the_end_is_read(base: PreTrainedModel, meter: LossMeter) -> None:
    prompt = torch.randint(VOCABULARY, (20,))
    hidden, mask = base_features(meter.model, meter.tuner, prompt[None], torch.ones(1, 20), max_tokens=6)
    assert mask.all()
    torch.testing.assert_close(hidden[0], expected(base, prompt[-6:]), atol=1e-5, rtol=1e-5)


def test_features_leave_the_model_as_it_was(meter: LossMeter) -> None:
    ids = torch.randint(VOCABULARY, (2, 9))

    def logits() -> Tensor:
        with torch.no_grad():
            return meter.model(input_ids=ids).logits

    try:
        meter.model.train()
        meter.tuner.use_stacks(["s002_code"])
        with_code = logits()
        base_features(meter.model, meter.tuner, ids, torch.ones_like(ids))
        assert meter.model.training
        assert torch.equal(logits(), with_code)
        meter.tuner.use_stacks([])
        assert not torch.equal(logits(), with_code)
    finally:
        meter.tuner.use_stacks(None)
        meter.model.eval()


def test_a_meter_reads_features_prompt_by_prompt(base: PreTrainedModel, meter: LossMeter) -> None:
    rng = seeded_random()
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for _ in range(11)]
    for prompt, features in zip(prompts, meter.features(prompts, max_tokens=16), strict=True):
        torch.testing.assert_close(features, expected(base, torch.tensor(prompt[-16:])), atol=1e-5, rtol=1e-5)


def test_features_of_gpt2(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4)).eval()
    ids = torch.randint(VOCABULARY, (2, 8))
    from peft import get_peft_model
    from support.routed import tuner_of

    from axolotl_brainstacks.adapter import BrainstacksConfig

    wanted = torch.stack([expected(base, row) for row in ids])
    model = get_peft_model(base, BrainstacksConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    hidden, _ = base_features(model, tuner_of(model), ids, torch.ones_like(ids))
    torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)


def test_the_network_has_about_two_million_parameters_at_the_papers_width() -> None:
    count = sum(parameter.numel() for parameter in OutcomeRouter(3840, 5).parameters())
    assert 1.9e6 < count < 2.4e6


def test_the_networks_logits_do_not_depend_on_padding() -> None:
    network = OutcomeRouter(24, 3, width=16).eval()
    hidden, mask = torch.randn(1, 9, 24), torch.arange(9)[None] < 5
    padded = torch.where(mask.unsqueeze(-1), hidden, 1e3 * torch.randn_like(hidden))
    torch.testing.assert_close(network(padded, mask), network(hidden[:, :5], mask[:, :5]), atol=1e-6, rtol=1e-5)


def test_every_parameter_of_the_network_learns() -> None:
    network = OutcomeRouter(24, 3, width=16)
    network(torch.randn(4, 9, 24), torch.ones(4, 9)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_domains_attend_to_tokens_of_their_own() -> None:
    network = OutcomeRouter(24, 3, width=16).eval()
    hidden, mask = torch.randn(1, 9, 24), torch.ones(1, 9)
    before = network(hidden, mask)
    with torch.no_grad():
        network.domain_queries[1] *= -5  # a constant would be lost: normed tokens sum to zero
    changed = (network(hidden, mask) != before)[0].tolist()
    assert changed == [False, True, False]


@pytest.mark.parametrize(("temperature", "acts_as"), [(0.01, 0.3), (0.5, 0.5), (50.0, 3.0), (-1.0, 0.3)])
def test_the_temperature_is_clamped(temperature: float, acts_as: float) -> None:
    network = OutcomeRouter(24, 3, width=16).eval()
    hidden, mask = torch.randn(2, 9, 24), torch.ones(2, 9)
    plain = network(hidden, mask)
    with torch.no_grad():
        network.temperature.fill_(temperature)
    torch.testing.assert_close(network(hidden, mask), plain / acts_as)
