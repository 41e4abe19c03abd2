"""Stacks as PEFT sees them: saving, loading, switching, copying, wrapping and compiling."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from support.wrapped import (
    TINY,
    assert_near,
    freeze,
    gemma3,
    layers_of,
    llama,
    load_base,
    logits,
    revive,
    tokens,
    tuner_of,
    wrap,
)
from support.wrapped import base_dir as base_dir
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from axolotl_brainstacks.serving.model import BrainstacksModel

PREFIX = "base_model.model."


# Saving and loading a stack


@pytest.mark.parametrize("settings", [{}, {"target_modules": "all-linear"}, {"target_modules": r".*\.(q|down)_proj"}])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_stack_comes_back_to_the_last_bit(
    base_dir: Path, tmp_path: Path, settings: dict[str, Any], low_cpu_mem_usage: bool
) -> None:
    model, ids = wrap(load_base(base_dir), **settings), tokens()
    revive(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(base_dir), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, ids), expected)
    assert not torch.equal(logits(load_base(base_dir), ids), expected)


def test_a_checkpoint_holds_the_stack_in_training_and_nothing_frozen(tmp_path: Path) -> None:
    model = wrap(target_modules=["q_proj", "up_proj"])
    freeze(model, ["s001_chat", "s002_chat"])
    names = {f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")}
    expected = {f"{PREFIX}{name}.brainstacks_{side}" for name in names for side in "AB"}
    in_memory = {key for key in model.state_dict() if "brainstacks" in key or "bank" in key}
    assert in_memory == {f"{key}.default.weight" for key in expected}
    assert set(get_peft_model_state_dict(model)) == {f"{key}.weight" for key in expected}
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    exported = tuner_of(model).export_stack("default")
    assert set(on_disk) == set(exported) == {f"{key}.weight" for key in expected}
    assert all(torch.equal(on_disk[key], tensor) for key, tensor in exported.items())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BRAINSTACKS" and config["target_modules"] == ["q_proj", "up_proj"]


def test_only_the_stack_in_training_is_trainable() -> None:
    model = wrap()
    freeze(model, ["s001_chat"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".brainstacks_" in name}
    frozen = {key: tensor.clone() for key, tensor in exported_frozen(model).items()}
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    assert all(torch.equal(tensor, frozen[key]) for key, tensor in exported_frozen(model).items())


def exported_frozen(model: PeftModel) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".bank." in name}


def test_a_stack_is_loaded_beside_another_to_train_on(tmp_path: Path) -> None:
    base, ids = llama(), tokens()
    model = wrap(copy.deepcopy(base))
    revive(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    other = wrap(copy.deepcopy(base))
    other.load_adapter(str(tmp_path), "second", is_trainable=True)
    assert torch.equal(logits(other, ids), logits(base, ids))
    other.set_adapter("second")
    assert torch.equal(logits(other, ids), expected)
    other.train()(input_ids=ids, labels=ids).loss.backward()
    assert {name.split(".")[-2] for name, p in other.named_parameters() if p.grad is not None} == {"second"}
    other.delete_adapter("second")
    assert torch.equal(logits(other, ids), logits(base, ids))


def test_a_bf16_base_trains_its_stack_in_fp32_and_holds_frozen_ones_in_bf16() -> None:
    model = wrap(llama(dtype=torch.bfloat16).to(torch.bfloat16))
    freeze(model, ["s001_chat"])
    assert {p.dtype for name, p in model.named_parameters() if "brainstacks" in name} == {torch.float32}
    assert {buffer.dtype for buffer in exported_frozen(model).values()} == {torch.bfloat16}
    ids = tokens()
    model.train()
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()


# Switching


def test_disabling_adapters_leaves_frozen_stacks_on() -> None:
    base, ids = llama(), tokens()
    model = wrap(copy.deepcopy(base))
    before_this_stack = wrap(copy.deepcopy(base))
    tensors = freeze(model, ["s001_chat", "s002_chat"])
    for name, stack in tensors.items():
        tuner_of(before_this_stack).attach_stack(name, "chat", model.peft_config["default"], stack)
    expected = logits(before_this_stack, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(model, ids), expected)
    assert all(p.requires_grad for name, p in model.named_parameters() if "brainstacks" in name)
    with tuner_of(model).disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    with tuner_of(model).using_stacks([]), model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base, ids))


def test_the_reference_copy_that_dpo_makes() -> None:
    """TRL: add `ref` with the config of `default`, copy the weights, set_adapter("ref") under no_grad, and back."""
    model, ids = wrap(target_modules="all-linear"), tokens()
    freeze(model, ["s001_chat"])
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    reference = logits(model, ids)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), reference)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert all(layer.statistics is None for layer in layers_of(model)), "the reference's passes are counted"
    model.set_adapter("default")
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"default"}
    revive(model)
    assert not torch.equal(logits(model, ids), reference)
    model.set_adapter("ref")
    assert torch.equal(logits(model, ids), reference)
    assert {key.split(".")[-1] for key in get_peft_model_state_dict(model, adapter_name="ref")} == {"weight"}


def test_the_selection_of_stacks() -> None:
    model, ids = wrap(), tokens(3)
    freeze(model, ["s001_chat", "s002_chat", "s003_code"])
    tuner = tuner_of(model)
    assert [stack.name for stack in tuner.stacks] == ["s001_chat", "s002_chat", "s003_code"]
    everything = logits(model, ids)
    tuner.use_stacks(["s001_chat", "s003_code"])
    two = logits(model, ids)
    assert not torch.equal(two, everything)
    weights = torch.tensor([[1.0, 0.0, 1.0]] * 3)
    tuner.use_stacks(["s001_chat", "s002_chat", "s003_code"], weights)
    assert torch.equal(logits(model, ids), two), "a stack of weight 0 in every row must be as if absent"
    weights = torch.rand(3, 2)
    tuner.use_stacks(["s001_chat", "s003_code"], weights)
    weighted = logits(model, ids)
    with tuner.using_stacks(["s002_chat"]):
        with tuner.using_stacks([]):
            assert not any(layer.bank.active for layer in layers_of(model))
        assert not torch.equal(logits(model, ids), weighted)
    assert torch.equal(logits(model, ids), weighted), "the weights from before are lost"
    for row in range(3):
        tuner.use_stacks(["s001_chat", "s003_code"], weights[row : row + 1])
        assert_near(logits(model, ids[row : row + 1]), weighted[row : row + 1], 1e-4)
    tuner.use_stacks(None)
    assert torch.equal(logits(model, ids), everything)
    tuner.detach_stack("s002_chat")
    assert torch.equal(logits(model, ids), two)


def test_every_selection_calls_the_same_modules() -> None:
    """ZeRO-3 hangs where one rank calls a module that another, with other stacks on, does not."""
    model = wrap(llama())
    freeze(model, ["s001_chat", "s002_code"])
    calls: list[torch.nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    seen = []
    for names in ([], ["s002_code"], ["s001_chat", "s002_code"]):
        tuner_of(model).use_stacks(names)
        calls.clear()
        logits(model, tokens())
        seen.append(calls.copy())
    assert len(seen[0]) > 20 and seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "names,weights,message",
    [
        (["s001_chat", "s009_law"], None, r"s009_law.*attached are s001_chat"),
        (["s001_chat"], torch.ones(2, 3), r"weights.*\(2, 3\)"),
        (["s001_chat"], torch.ones(1), r"weights.*\(1,\)"),
    ],
)
def test_a_wrong_selection_is_refused(names: list[str], weights: Tensor | None, message: str) -> None:
    model = wrap()
    freeze(model, ["s001_chat"])
    with pytest.raises(ValueError, match=message):
        tuner_of(model).use_stacks(names, weights)


def test_peft_cannot_mix_adapters_by_name() -> None:
    model = wrap()
    for call in (model.forward, model.generate):
        with pytest.raises(ValueError, match="adapter_names"):
            call(input_ids=tokens(), adapter_names=["default", "default"])


def test_stacks_cannot_be_merged_but_can_be_taken_off() -> None:
    base, ids = llama(), tokens()
    model = wrap(copy.deepcopy(base))
    freeze(model, ["s001_chat"])
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model.unload(), ids), logits(base, ids))


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, ids = wrap(), tokens()
    freeze(model, ["s001_chat", "s002_chat"])
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), expected)
    tuner_of(model).detach_stack("s001_chat")
    assert torch.equal(logits(twin, ids), expected)


# What is wrapped


def llava() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    return LlavaForConditionalGeneration(LlavaConfig(text_config={"model_type": "llama"} | TINY, vision_config=vision))


@pytest.mark.parametrize("make_base", [gemma3, llava])
@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q_proj|v_proj|o_proj|fc1|linear_1)"], ids=str)
def test_only_the_language_model_of_a_multimodal_model_is_wrapped(make_base: Any, targets: str | None) -> None:
    base = make_base()
    tower = [name for name, _ in base.named_modules() if "vision" in name and name.endswith(("q_proj", "fc1"))]
    assert tower, "the test needs a vision tower with names that match"
    model = wrap(base, target_modules=targets)
    names = [layer.module_name for layer in layers_of(model)]
    assert len(names) == 2 * (3 if targets and "q_proj" in targets else 7)
    assert all("language_model.layers." in name for name in names)
    revive(model)
    ids = tokens()
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[:2] == ids.shape


def test_all_linear_leaves_the_head_alone() -> None:
    for tie in (True, False):
        model = wrap(llama(tie_word_embeddings=tie), target_modules="all-linear")
        assert len(layers_of(model)) == 14
        assert type(model.get_base_model().lm_head) is torch.nn.Linear


def test_layers_and_exclusions_are_pefts() -> None:
    model = wrap(layers_to_transform=[1], exclude_modules=["v_proj"])
    assert len(layers_of(model)) == 6
    assert all(".layers.1." in layer.module_name and "v_proj" not in layer.module_name for layer in layers_of(model))


def test_a_frozen_stack_may_cover_projections_that_the_new_one_does_not() -> None:
    base, ids = llama(), tokens()
    wide = wrap(copy.deepcopy(base))
    tensors = freeze(wide, ["s001_chat"])["s001_chat"]
    with wide.disable_adapter():
        expected = logits(wide, ids)
    model = wrap(copy.deepcopy(base), target_modules=["q_proj"])
    tuner = tuner_of(model)
    tuner.attach_stack("s001_chat", "chat", wide.peft_config["default"], tensors)
    assert len(layers_of(model)) == 14
    assert torch.equal(logits(model, ids), expected)
    assert {key.split(".")[-3] for key in tuner.export_stack("default")} == {"q_proj"}
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj"}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    model.set_adapter("default")
    tuner.detach_stack("s001_chat")
    assert torch.equal(logits(model, ids), logits(base, ids))


# A stack that does not fit


def broken(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    key = list(tensors)[-2]  # an A matrix of the last projection: the others are attached before it
    other = {name: tensor for name, tensor in tensors.items() if name != key}
    return {
        "half": other,
        "shape": other | {key: tensors[key][:-1]},
        "key": tensors | {key.replace("brainstacks_A", "lora_A"): tensors[key]},
        "module": other | {k.replace("layers.1.", "layers.7."): t for k, t in tensors.items() if "down_proj" in k},
        "no linear": other | {k.replace(".down_proj", ""): t for k, t in tensors.items() if "down_proj" in k},
    }[how]


@pytest.mark.parametrize("how", ["half", "shape", "key", "module", "no linear"])
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_stack_that_does_not_fit_is_refused_and_leaves_nothing(how: str) -> None:
    model, ids = wrap(), tokens()
    tensors = freeze(model, ["s001_chat"])["s001_chat"]
    expected = logits(model, ids)
    tuner = tuner_of(model)
    with pytest.raises(ValueError, match=r"down_proj|layers|lora_A"):
        tuner.attach_stack("s002_chat", "chat", model.peft_config["default"], broken(tensors, how))
    assert [stack.name for stack in tuner.stacks] == ["s001_chat"]
    assert all(layer.bank.names in ([], ["s001_chat"]) for layer in layers_of(model))
    assert torch.equal(logits(model, ids), expected)
    tuner.attach_stack("s002_chat", "chat", model.peft_config["default"], tensors)


def test_a_stack_is_attached_once() -> None:
    model = wrap()
    tensors = freeze(model, ["s001_chat"])["s001_chat"]
    with pytest.raises(ValueError, match="s001_chat is attached already"):
        tuner_of(model).attach_stack("s001_chat", "chat", model.peft_config["default"], tensors)


# torch.compile


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_torch_compile_makes_one_graph_of_checkpointed_layers_with_the_same_loss_and_gradients() -> None:
    model, ids = wrap(llama(num_hidden_layers=1), noisy_gate=False, balance_coef=0.1), tokens(2, 6)
    freeze(model, ["s001_chat", "s002_chat", "s003_code"])
    tuner = tuner_of(model)
    tuner.use_stacks(["s001_chat", "s003_code"], torch.rand(2, 2))
    tuner.set_null_space(
        "default",
        {layer.module_name: torch.linalg.qr(torch.randn(layer.out_features, 3))[0] for layer in layers_of(model)},
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()  # a hook of Transformers that breaks every graph
    model.train()
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    eager = model(**inputs).loss
    eager.backward()
    expected = gradients(model)

    torch._dynamo.reset()
    model.zero_grad()
    counts = [float(layer.statistics[-1]) for layer in layers_of(model)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # raises at the first break
    loss = compiled(**inputs).loss
    loss.backward()
    assert_near(loss, eager, 1e-5)
    for name, gradient in gradients(model).items():
        assert_near(gradient, expected[name], 1e-3, name)
    assert all(float(layer.statistics[-1]) > count for layer, count in zip(layers_of(model), counts, strict=True))


def test_the_tuner_is_ours() -> None:
    assert isinstance(wrap().base_model, BrainstacksModel)
