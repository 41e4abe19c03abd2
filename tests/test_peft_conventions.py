"""What PEFT, and programs that use it, expect of every tuner."""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTuner
from support.wrapped import gemma3, layers_of, llama, revive, tokens, tuner_of, wrap
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from axolotl_brainstacks.adapter import BrainstacksConfig, BrainstacksLinear
from axolotl_brainstacks.serving.model import BrainstacksModel

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


# Modules that are trained in full


@pytest.mark.parametrize(
    ("head", "task", "modules"),
    [
        (LlamaForSequenceClassification, "SEQ_CLS", None),
        (LlamaForTokenClassification, "TOKEN_CLS", None),
        (LlamaForQuestionAnswering, "QUESTION_ANS", None),
        (LlamaForCausalLM, "CAUSAL_LM", ["lm_head"]),
    ],
)
def test_a_head_is_trained_saved_and_loaded_with_its_stack(
    head: type[PreTrainedModel], task: str, modules: list[str] | None, tmp_path: Path
) -> None:
    base, ids = head(llama().config), tokens()
    before = {name: p.clone() for name, p in base.named_parameters()}
    config = BrainstacksConfig(r=2, task_type=task, modules_to_save=modules)
    model = get_peft_model(copy.deepcopy(base), config)
    revive(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".modules_to_save.default." in name for name in trainable)
    model.train()(input_ids=ids)[0].square().mean().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if "modules_to_save" in name and not same(p, name, before)]
    assert moved, "the head does not learn"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.equal(answer(again, ids), answer(model, ids))
    with again.disable_adapter():
        assert torch.equal(answer(again, ids), answer(base, ids))


@torch.no_grad()
def answer(model: nn.Module, ids: Tensor) -> Tensor:
    output: Tensor = model.eval()(input_ids=ids)[0]
    return output


def same(p: Tensor, name: str, before: dict[str, Tensor]) -> bool:
    original = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
    return torch.equal(p, before[original])


def test_modules_to_save_do_not_go_with_a_library(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modules_to_save.*lm_head.*`library`.*leave one"):
        BrainstacksConfig(library=str(tmp_path), modules_to_save=["lm_head"])
    config = BrainstacksConfig(library=str(tmp_path), task_type="SEQ_CLS")  # PEFT adds the heads to it
    with pytest.raises(ValueError, match=r"modules_to_save.*score.*`library`.*SEQ_CLS"):
        get_peft_model(LlamaForSequenceClassification(llama().config), config)
    values = BrainstacksConfig(modules_to_save=["lm_head"]).to_dict()
    with pytest.raises(ValueError, match=r"Stack s001_chat.*modules_to_save.*lm_head.*train without"):
        BrainstacksConfig.of_stack("s001_chat", values)


def test_modules_to_save_are_a_list() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save is 'lm_head'.*list"):
        BrainstacksConfig(modules_to_save="lm_head")  # type: ignore[arg-type]


# Which layers


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform`.*q_proj.*list the modules"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "`layers_pattern`.*q_proj.*list the modules"),
        ({"target_modules": ["q_proj"], "layers_pattern": ["h"]}, "`layers_pattern`.*`layers_to_transform`.*'h'"),
    ],
)
def test_a_choice_of_layers_that_peft_would_ignore_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BrainstacksConfig(**wrong)
    BrainstacksConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")


@pytest.mark.parametrize("depth", [2, 4])  # from 20 names on PEFT shortens them to their ends
@pytest.mark.parametrize("targets", [None, "all-linear", ["model.layers.0.mlp.up_proj", "q_proj", "k_proj"]], ids=str)
def test_layers_are_chosen_whatever_names_the_targets(depth: int, targets: Any, tmp_path: Path) -> None:
    base = llama(num_hidden_layers=depth)
    model = wrap(copy.deepcopy(base), target_modules=targets, layers_to_transform=[1], layers_pattern="layers")
    names = [layer.module_name for layer in layers_of(model)]
    assert len(names) == (2 if isinstance(targets, list) else 7) and all(".layers.1." in name for name in names)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, str(tmp_path))
    assert [layer.module_name for layer in layers_of(again)] == names


# A second adapter


def test_a_second_all_linear_adapter_wraps_what_the_first_does() -> None:
    model = wrap(target_modules="all-linear")
    second = BrainstacksConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    assert all(set(layer.shapes) == {"default", "second"} for layer in layers_of(model))
    assert len(layers_of(model)) == 14


def test_fresh_adapters_of_one_process_differ_and_a_seed_repeats_them() -> None:
    def fresh() -> list[Tensor]:
        model = wrap(copy.deepcopy(base))
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        layer = layers_of(model)[0]
        return [layer.trained(name)[0].weight.detach() for name in ("default", "second")]

    base = llama()
    torch.manual_seed(3)
    first, others = fresh(), fresh()
    for one in (first[1], *others):
        assert not torch.equal(first[0], one)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(fresh(), first, strict=True))


# Names of the base model


def test_what_the_base_model_calls_layers_is_reached_through_the_wrapped_model() -> None:
    base = LlamaModel(llama().config)
    model = get_peft_model(base, BrainstacksConfig(r=2))
    assert model.layers is base.layers and model.layers[0] is base.layers[0]
    assert isinstance(model.base_model, BrainstacksModel)


def test_no_public_name_of_ours_is_one_of_a_model_in_transformers() -> None:
    model = wrap()
    ours = {name for name in (*dir(BrainstacksModel), *vars(tuner_of(model))) if not name.startswith("_")}
    of_peft = {*dir(BaseTuner), *vars(get_peft_model(llama(), LoraConfig()).base_model)}
    ours -= {*of_peft, "generate"}  # ours calls the base model's
    assert {"brainstacks_layers", "use_stacks", "router", "mode"} <= ours
    taken: dict[str, str] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        taken |= {name: owner for owner, name in names_of_models(path) if name in ours}
    assert not taken


def names_of_models(path: Path) -> Iterator[tuple[str, str]]:
    """The attributes that each pretrained model in a file of Transformers sets, and its methods."""
    models: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {ast.unparse(base) for base in node.bases}
        if not (bases & models or any(base.endswith("PreTrainedModel") for base in bases)):
            continue
        models.add(node.name)
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef):
                yield node.name, inner.name
            elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                yield node.name, inner.attr


# Odd inputs


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 24)], ids=str)
def test_one_token_alone_or_none_at_all(shape: tuple[int, ...], frozen: bool) -> None:
    layer = BrainstacksLinear(nn.Linear(24, 40).requires_grad_(False), "layers.0.some_proj")
    config = BrainstacksConfig(r=2, num_experts=3, noisy_gate=False)
    layer.update_layer("default", config)
    layer.brainstacks_B["default"].weight.data.normal_()
    if frozen:
        layer.attach("s001", config, *(torch.randn_like(part) for part in layer.export_stack("default")))
        layer.bank.select(["s001"])
    x = torch.randn(shape, requires_grad=True)
    y = layer.train()(x)
    as_rows = layer(x.detach().reshape(-1, 24)).reshape(y.shape)
    assert y.shape == (*shape[:-1], 40) and torch.allclose(y, as_rows, atol=1e-6)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for side in layer.trained("default"):
        assert side.weight.grad is not None and torch.isfinite(side.weight.grad).all()
    if x.numel() == 0:
        assert layer.statistics is None, "a forward without tokens counts"


def test_input_casting_can_be_turned_off_for_a_while() -> None:
    layer = BrainstacksLinear(nn.Linear(24, 40), "layers.0.some_proj")
    layer.update_layer("default", BrainstacksConfig(r=2))
    holder = nn.ModuleDict({"projection": layer.double()})
    x = torch.randn(2, 24)
    with disable_input_dtype_casting(holder), pytest.raises(RuntimeError, match="dtype"):
        layer.add_trained("default", x, torch.randn(2, 40))
    assert layer.add_trained("default", x, torch.randn(2, 40)).shape == (2, 40)


# Composite models


def encoder_decoder() -> PreTrainedModel:
    decoder = BertConfig(vocab_size=64, is_decoder=True, add_cross_attention=True, **SMALL)
    encoder = BertConfig(vocab_size=64, **SMALL)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return EncoderDecoderModel(config, encoder=BertModel(encoder), decoder=BertLMHeadModel(decoder))


def vision_encoder_decoder() -> PreTrainedModel:
    decoder = BertConfig(vocab_size=64, is_decoder=True, add_cross_attention=True, **SMALL)
    encoder = ViTConfig(image_size=8, patch_size=4, **SMALL)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return VisionEncoderDecoderModel(config, encoder=ViTModel(encoder), decoder=BertLMHeadModel(decoder))


def test_encoder_and_decoder_of_a_text_model_are_wrapped() -> None:
    model = get_peft_model(encoder_decoder(), BrainstacksConfig(r=2, target_modules=["query", "value"]))
    names = [layer.module_name for layer in layers_of(model)]
    assert sum(name.startswith("encoder.") for name in names) == 2
    assert sum(name.startswith("decoder.") for name in names) == 4  # its own attention, and that on the encoder


def test_the_encoder_of_images_stays_as_it_is() -> None:
    targets = ["query", "value", "q_proj", "v_proj"]
    model = get_peft_model(vision_encoder_decoder(), BrainstacksConfig(r=2, target_modules=targets))
    assert layers_of(model) and all(layer.module_name.startswith("decoder.") for layer in layers_of(model))


def test_a_vision_tower_that_is_named_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"fc1.*vision_tower.*fc1.*language model alone.*language_model"):
        wrap(gemma3(), target_modules=["fc1"])
    with pytest.raises(ValueError, match=r"no_such_module.*not found"):
        wrap(gemma3(), target_modules=["no_such_module"])
