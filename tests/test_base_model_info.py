"""The base model of a library: known again in every kind of load, and no other is taken for it."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.base_models import KINDS, load, merged, old_record
from support.random_library import new_library
from support.routed import tuner_of
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.base_model import BaseModelInfo


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def tiny_model(**changes: object) -> LlamaForCausalLM:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | {"vocab_size": 2048} | changes)))


def test_one_model_is_the_same_base_in_every_pair_of_loads(tiny_llama_dir: Path) -> None:
    infos = {kind: BaseModelInfo.of(load(tiny_llama_dir, kind), kind) for kind in KINDS}
    assert infos["double nf4 of bf16"].loaded_as == "bfloat16, nf4 from bfloat16"
    for recorded in infos.values():
        for loaded in infos.values():
            recorded.check(loaded)


def test_volatile_settings_and_a_grown_vocabulary_are_the_same_base(tmp_path: Path) -> None:
    for vocabulary in (2048, 200):
        model = tiny_model(vocab_size=vocabulary)
        base = BaseModelInfo.of(model, "tiny", "main")
        model.save_pretrained(tmp_path / str(vocabulary))
        reloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(vocabulary), dtype=torch.bfloat16, attn_implementation="eager"
        )
        base.check(BaseModelInfo.of(reloaded, "reloaded"))
        model.config.max_position_embeddings *= 2
        model.config.eos_token_id = 5
        model.config.use_cache = False
        model.resize_token_embeddings(vocabulary + 48)
        base.check(BaseModelInfo.of(model, "resized"))


def test_other_models_are_refused() -> None:
    model = tiny_model()
    base = BaseModelInfo.of(model, "org/right", "v1")
    for changes in ({"num_hidden_layers": 2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        with pytest.raises(ValueError, match="org/right@v1, but org/wrong has another architecture"):
            base.check(BaseModelInfo.of(tiny_model(**changes), "org/wrong"))
    with pytest.raises(ValueError, match="org/right@v1, but org/wrong has the same architecture with other weights"):
        base.check(BaseModelInfo.of(tiny_model(), "org/wrong"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"other weights.*model\.embed_tokens\.weight.*set base_model to org/right"):
        base.check(BaseModelInfo.of(model, "tuned"))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"base_model broken has NaN.*model\.embed_tokens\.weight"):
        BaseModelInfo.of(model, "broken")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "double nf4 of bf16", "int8 of bf16"])
def test_a_model_whose_embeddings_alone_are_the_same_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    changed = load(tiny_llama_dir, "fp32")
    count = 0
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "embed" not in name:
                parameter.copy_(parameter.roll(1, 0) * 1.1)
                count += 1
    changed.save_pretrained(tmp_path)
    base = BaseModelInfo.of(load(tiny_llama_dir, kind), "right").model_copy(update={"checkpoint": None})
    other = BaseModelInfo.of(load(tmp_path, kind), "wrong")
    assert base.fingerprint == other.fingerprint
    with pytest.raises(ValueError, match=rf"right.*wrong.*q_proj\.weight differs, and {count - 1} more of"):
        base.check(other)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "double nf4 of bf16"])
def test_one_changed_norm_is_refused(tiny_llama_dir: Path, kind: str) -> None:
    model = load(tiny_llama_dir, kind)
    base = BaseModelInfo.of(model, "right")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"layers\.1\.post_attention_layernorm\.weight differs, and 0 more of 21"):
        base.check(BaseModelInfo.of(model, "wrong"))


def test_adapters_around_modules_are_no_part_of_the_base() -> None:
    model = tiny_model()
    base = BaseModelInfo.of(model, "tiny")
    wrapped = get_peft_model(copy.deepcopy(model), BrainstacksConfig(task_type="CAUSAL_LM", r=2))
    assert BaseModelInfo.of(tuner_of(wrapped).model, "tiny") == base
    with torch.no_grad():
        tuner_of(wrapped).model.model.layers[0].mlp.up_proj.get_base_layer().weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight differs"):
        base.check(BaseModelInfo.of(tuner_of(wrapped).model, "wrong"))


def test_conv1d_and_tied_weights() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=64))
    base = BaseModelInfo.of(model, "gpt2")
    base.check(BaseModelInfo.of(copy.deepcopy(model).half(), "half"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.add_(1e-3)
        model.lm_head.weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight differs, and 1 more of 16"):
        base.check(BaseModelInfo.of(model, "wrong"))


def test_all_of_a_multimodal_model_is_compared() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    base = BaseModelInfo.of(model, "gemma")
    base.check(BaseModelInfo.of(copy.deepcopy(model).bfloat16(), "half"))
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"vision_tower\.encoder\.layers\.0\.mlp\.fc1\.weight differs, and 0 more"):
        base.check(BaseModelInfo.of(model, "wrong"))


def test_parameters_that_are_not_in_memory_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    base = BaseModelInfo.of(model, "tiny")
    offloaded = copy.deepcopy(model)
    offloaded.model.layers[0].mlp.to("meta")
    with caplog.at_level(logging.WARNING):
        base.check(BaseModelInfo.of(offloaded, "offloaded"))
    assert "3 of 12 parameters" in caplog.text
    with torch.no_grad():
        offloaded.model.norm.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"model\.norm\.weight differs"):
        base.check(BaseModelInfo.of(offloaded, "offloaded"))


def test_an_old_record_is_checked_by_embeddings_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    base = old_record(BaseModelInfo.of(model, "tiny"))
    with caplog.at_level(logging.WARNING):
        base.check(BaseModelInfo.of(copy.deepcopy(model).bfloat16(), "half"))
    assert "tiny" in caplog.text and "axolotl train" in caplog.text and len(caplog.records) == 1
    with pytest.raises(ValueError, match=r"other weights.*embeddings differ"):
        base.check(BaseModelInfo.of(tiny_model(), "other"))


def test_a_writer_completes_an_old_record(tmp_path: Path) -> None:
    model = tiny_model()
    base = BaseModelInfo.of(model, "tiny")
    library = Library.create(tmp_path / "library", old_record(base))
    with library.writing():
        library.complete_base(base)
        library.complete_base(BaseModelInfo.of(tiny_model(), "other"))
    assert Library.open(library.path).manifest.base == base
    with pytest.raises(ValueError, match="other weights"):
        library.manifest.base.check(BaseModelInfo.of(merged(model, 3e-3), "merged"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", ["Infinity"] + [0.5] * 31),
        ("fingerprint", ["NaN"] + [0.5] * 31),
        ("fingerprint", []),
        ("fingerprint", None),
        ("checkpoint", {"layout": "?", "tensors": ""}),
    ],
)
def test_a_manifest_with_a_damaged_record_is_refused(tmp_path: Path, field: str, value: object) -> None:
    library = new_library(tmp_path / "library", "chat")
    path = library.path / "manifest.json"
    data = json.loads(path.read_text())
    data["base"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged at base.*restore it from a copy"):
        Library.open(library.path)


def test_damaged_samples_are_named() -> None:
    base = BaseModelInfo.of(tiny_model(), "tiny")
    assert base.weights is not None
    for weights in ("", "?", base.weights[: len(base.weights) // 2 // 4 * 4], "AAAA"):
        with pytest.raises(ValueError, match=r"tiny is damaged at base\.weights.*restore manifest\.json"):
            base.model_copy(update={"weights": weights}).check(base)
