"""The base model of a library: known again in every dtype, and no other is taken for it."""

import copy
from pathlib import Path

import pytest
import torch

from axolotl_brainstacks.manifest import BaseModelInfo


def tiny_model(**changes: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | {"vocab_size": 2048} | changes)))


def test_one_model_in_every_dtype_is_the_same_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny_model()
    base = BaseModelInfo.of(model, "tiny", "main")
    for dtype in (torch.bfloat16, torch.float16):
        base.check(BaseModelInfo.of(copy.deepcopy(model).to(dtype), "half"))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    base.check(BaseModelInfo.of(reloaded, "reloaded"))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    assert any(type(module).__name__ == "Linear4bit" for module in quantised.modules())
    base.check(BaseModelInfo.of(quantised, "quantised"))
    model.config.max_position_embeddings *= 2
    model.config.eos_token_id = 5
    model.config.use_cache = False
    model.resize_token_embeddings(2048 + 64)
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
    with pytest.raises(ValueError, match="other weights"):
        base.check(BaseModelInfo.of(model, "tuned"))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="other weights"):
        base.check(BaseModelInfo.of(model, "broken"))
