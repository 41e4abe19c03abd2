"""Samples of weights: intervals that hold the true weights, differences that are seen, and how small the record is."""

import copy
import logging
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from support.base_models import KINDS, load, merged
from torch.distributions import StudentT
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.weight_samples import Sample, WeightSamples
from axolotl_brainstacks.library.weight_sampling import MATRIX_ENTRIES, VECTOR_ENTRIES, VOCABULARY_ROWS, sample_weights


@pytest.fixture(scope="module")
def heavy_tailed(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with outliers, which make quantised scales coarse; tiny and zero ones among them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(StudentT(2.5).sample(parameter.shape) * 0.02)
            parameter.flatten()[::7] *= 1e-5
            parameter.flatten()[::11] = 0
    folder = tmp_path_factory.mktemp("heavy")
    model.save_pretrained(folder)
    return folder


def entries_of(parameter: torch.Tensor, vocabulary: bool) -> torch.Tensor:
    """The sampled entries, by the definition: multiples of the golden ratio, modulo 1, of all entries in order."""
    golden = 0x9E3779B97F4A7C15
    rows = parameter.shape[0]
    if vocabulary:
        rows = max(power for power in (2**k for k in range(11)) if power <= min(rows, VOCABULARY_ROWS))
    flat = parameter[:rows].reshape(-1)
    count = MATRIX_ENTRIES if parameter.dim() > 1 else VECTOR_ENTRIES
    if len(flat) <= count:
        return flat
    return flat[[int(i * golden % 2**64 * len(flat) // 2**64) for i in range(count)]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_holds_the_weight_in_the_type_it_was_quantised_from(heavy_tailed: Path, kind: str) -> None:
    true = load(heavy_tailed, "fp32")
    samples = sample_weights(load(heavy_tailed, kind))
    quantised = 0
    for name, parameter in true.named_parameters():
        sample = samples.samples[name]
        weights = entries_of(parameter.data, "embed" in name or "lm_head" in name).to(getattr(torch, sample.source))
        low, high = sample.interval(samples.tables)
        assert (low <= weights.double()).all() and (weights.double() <= high).all(), name
        if sample.scales is not None:
            quantised += 1
            width = (high - low) / sample.scales.double()
            # A code's cell is at most a third of its scale, and what a double-quantised scale may be off is added.
            assert (width <= (0.02 if sample.format == "int8" else 0.34) + 2.1 * sample.slack / sample.scales).all()
        else:
            assert torch.equal(low, weights.double())
    assert quantised == (14 if KINDS[kind][1] else 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "4 of" in kind])
def test_sampled_entries_are_those_that_bitsandbytes_dequantises(heavy_tailed: Path, kind: str) -> None:
    model = load(heavy_tailed, kind)
    samples = sample_weights(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            sample, state = samples.samples[name], copy.copy(parameter.quant_state)
            state.dtype = torch.float32
            expected = entries_of(bnb.functional.dequantize_4bit(parameter.data, state), False)
            found = samples.tables[sample.format][sample.values.long()] * sample.scales
            assert torch.allclose(found, expected, rtol=1e-6, atol=0), name


def test_weights_repacked_for_a_cpu_are_left_out(tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = BaseModelInfo.of(load(tiny_llama_dir, "bf16"), "tiny")
    model = load(tiny_llama_dir, "double nf4 of bf16")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed = bnb.functional._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            module.weight.data, module.weight.quant_state = packed
    with caplog.at_level(logging.WARNING):
        base.check(BaseModelInfo.of(model, "repacked"))
    assert "14 of 21 parameters" in caplog.text


def test_a_record_survives_text_and_keeps_the_model_s_order(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir, "double nf4 of bf16")
    samples = sample_weights(model)
    again = WeightSamples.from_text(samples.to_text())
    assert list(again.samples) == [name for name, _ in model.named_parameters()]
    assert again.differing(samples) == [] and again.to_text() == samples.to_text()


def test_a_few_codes_on_a_border_may_differ_but_no_more(tiny_llama_dir: Path) -> None:
    """As between kernels of a CPU and a GPU."""
    samples = sample_weights(load(tiny_llama_dir, "nf4 of bf16"))
    other = WeightSamples(dict(samples.samples), samples.tables)
    for moved, names in enumerate([name for name, sample in samples.samples.items() if sample.scales is not None], 1):
        sample = samples.samples[names]
        values = sample.values.clone()
        values[5] += 1 if values[5] < 15 else -1
        other.samples[names] = Sample(sample.kind, values, sample.scales, sample.slack)
        assert bool(samples.differing(other)) == (moved > 2)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """In bf16, as most checkpoints are; the fixture's come from a coarse format, whose values are often ties."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 1e-4)
    return model.bfloat16()


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """In double-quantised NF4, as bitsandbytes does it when a model is loaded."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            data, state = bnb.functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight = bnb.nn.Params4bit(data, quant_state=state, quant_type="nf4", bnb_quantized=True)
    return model


def test_merged_loras_in_smollm2_are_seen_down_to_the_documented_size(smollm2_dir: Path) -> None:
    base = rounded(load(smollm2_dir, "fp32"))
    record, in_nf4 = sample_weights(base), sample_weights(quantised(base))
    assert record.differing(in_nf4) == [] and in_nf4.differing(record) == []

    for share, least in ((1e-5, 5), (3e-3, 200)):
        changed = merged(base.float(), share)
        assert len(record.differing(sample_weights(changed))) >= least, "bf16 and fp32"
        changed.bfloat16()
        assert len(record.differing(sample_weights(changed))) >= least, "bf16 and bf16"
    in_nf4_too = sample_weights(quantised(changed))
    assert len(record.differing(in_nf4_too)) >= 5 and len(in_nf4.differing(sample_weights(changed))) >= 5
    changed = merged(base.float(), 1e-3).bfloat16()
    assert len(in_nf4.differing(sample_weights(quantised(changed)))) >= 5, "NF4 and NF4"


def test_the_record_of_a_12b_model_is_small(tiny_llama_dir: Path) -> None:
    """Gemma 3 12B's parameters, 7 matrices and 6 norms a layer, in double-quantised NF4 with random codes and scales."""
    torch.manual_seed(0)
    samples = {
        f"model.layers.{layer}.self_attn.q_proj{i}.weight": Sample(
            "nf4 from bfloat16",
            torch.randn(MATRIX_ENTRIES).mul(3).add(8).clamp(0, 15).byte(),
            torch.rand(MATRIX_ENTRIES) * 0.02 + 0.08,
            (torch.rand(MATRIX_ENTRIES) * 1e-4).bfloat16(),
        )
        for layer in range(48)
        for i in range(7)
    }
    samples |= {
        f"model.layers.{i // 6}.post_attention_layernorm{i % 6}.weight": Sample(
            "bfloat16", torch.randn(VECTOR_ENTRIES).bfloat16()
        )
        for i in range(6 * 48 + 2)
    }
    assert len(samples) == 626
    text = WeightSamples(samples, {"nf4": torch.arange(16.0)}).to_text()
    assert len(text) < 200_000
    assert WeightSamples.from_text(text).differing(WeightSamples(samples, {"nf4": torch.arange(16.0)})) == []


def test_a_model_of_very_many_parameters_is_sampled_more_thinly() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=500, num_attention_heads=2, vocab_size=64
    )
    samples = sample_weights(AutoModelForCausalLM.from_config(config))
    counts = {len(sample.values) for sample in samples.samples.values()}
    assert len(samples.samples) == 4503 and max(counts) == 2**17 // 4503 and min(counts) >= 16


def test_gemma_in_bf16_and_fp32(gemma_dir: Path) -> None:
    full = BaseModelInfo.of(load(gemma_dir, "fp32"), "gemma")
    half = load(gemma_dir, "bf16")
    full.check(BaseModelInfo.of(half, "half"))
    BaseModelInfo.of(half, "half").check(full)
    assert AutoConfig.from_pretrained(gemma_dir).tie_word_embeddings
    with pytest.raises(ValueError, match=r"q_proj\.weight differs"):
        full.check(BaseModelInfo.of(merged(half, 3e-3), "merged"))
