"""Loading a library that a stranger made, or that has been altered: refused by name, or harmless."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save, save_file
from support.answering import DOMAINS, GREEDY, own_stacks, random_router, some_prompts
from support.hostile import change_config, change_manifest, change_tensors, replace
from support.routed import new_library, tiny_base, tuner_of
from support.wrapped import llama, load_base, revive, wrap
from torch import Tensor
from transformers import LlamaForCausalLM

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.curriculum.build import stand_for_library
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import CONFIG, WEIGHTS
from axolotl_brainstacks.serving.routes import PromptRoute


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return tiny_base()


@pytest.fixture(scope="module")
def original(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Library:
    torch.manual_seed(2)
    made = new_library(tmp_path_factory.mktemp("strange") / "library", base, DOMAINS)
    random_router(DOMAINS, seed=3).save(made)
    return made


@pytest.fixture
def path(original: Library, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original.path, tmp_path / "library"))


@pytest.fixture
def load(base: LlamaForCausalLM) -> Callable[[Path], PeftModel]:
    return lambda path: PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(4)
    return torch.stack(some_prompts(3, 8))


Load = Callable[[Path], PeftModel]


# The library's own folder


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.brainstacks_A.weight"]
)
def test_no_tensor_of_the_librarys_folder_is_taken(
    path: Path, load: Load, base: LlamaForCausalLM, key: str, listed: bool
) -> None:
    shape = base.get_parameter(key).shape if "brainstacks" not in key else (12, 32)
    data = save({f"base_model.model.{key}": torch.randn(shape)})
    replace(path, WEIGHTS, data)
    if not listed:
        change_manifest(path, lambda manifest: manifest.update(root={}))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    into = copy.deepcopy(base)
    with pytest.raises(ValueError, match=rf"{key}.*must be empty.*restore the file"):
        PeftModel.from_pretrained(into, str(path))
    for name, tensor in into.state_dict().items():
        original = name.replace("base_layer.", "")
        assert original not in before or torch.equal(tensor, before[original]), name


def test_no_weight_of_the_base_is_taken_from_a_stacks_folder(path: Path, load: Load) -> None:
    stack = "stacks/s001_chat/"
    change_tensors(
        path, stack, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(96, 32)})
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight.*would replace a weight of the base model"):
        load(path / stack)
    with pytest.raises(ValueError, match=r"s001_chat.*lm_head\.weight.*no tensor of a Brainstacks adapter"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"`target_modules` must be 'dummy-target-modules'.*q_proj.*restore"),
        ({"target_modules": None}, r"`target_modules` must be.*None"),
        ({"library": "../elsewhere"}, r"`library` must be '\.', but is '\.\./elsewhere'"),
        ({"library": "./../library"}, r"`library` must be '\.'"),
        ({"library": 7}, r"library is 7.*str"),
        ({"library": None}, r"no key `library`"),
        ({"library": None, "Library": "."}, r"no key `library`"),
        ({"library": None, "target_modules": ["q_proj"]}, r"no key `library`"),
        ({"task_type": None}, r"`task_type` must be 'CAUSAL_LM', but is None"),
        ({"task_type": "SEQ_CLS"}, r"`task_type` must be 'CAUSAL_LM', but is .*SEQ_CLS"),
        ({"task_type": "CAUSAL_LN"}, r"task type.*CAUSAL_LN"),
        ({"r": "4"}, r"r is '4'.*int"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_librarys_config_names_its_own_folder_and_nothing_else(
    path: Path, load: Load, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(path, path.with_name("elsewhere"))
    change_config(path, "", changes)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("key", ["library", "task_type", "peft_type"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "of an older version"])
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_flipped_byte_in_a_key_that_matters_is_an_error(path: Path, load: Load, key: str, listed: bool) -> None:
    """The base model alone would answer otherwise, or without routes."""
    whole = (path / CONFIG).read_bytes()
    start, rng = whole.index(f'"{key}"'.encode()) + 1, Random(5)
    if not listed:
        change_manifest(path, lambda manifest: manifest.update(root={}))
    for place in range(start, start + len(key)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(5)
        (path / CONFIG).write_bytes(data)
        with pytest.raises((ValueError, KeyError)):
            load(path)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_the_root_record_is_checked_at_load_and_by_verify(path: Path, load: Load, file: str) -> None:
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole + b" ")
    with pytest.raises(ValueError, match=rf"{file} is altered.*restore"):
        load(path)
    assert any(file in problem for problem in Library.open(path).verify())
    (path / file).write_bytes(whole)
    assert load(path) and Library.open(path).verify() == []
    change_manifest(path, lambda manifest: manifest.update(root={}))
    assert [problem.split(" is ")[0] for problem in Library.open(path).verify()] == [
        str(path / each) for each in (CONFIG, WEIGHTS)
    ]


@pytest.mark.parametrize("listed", [True, False])
def test_weights_of_the_root_that_are_no_tensors_are_named(path: Path, load: Load, listed: bool) -> None:
    """PEFT would say only what its reader minds; a folder that trains on the library, as `output_dir`, is the same."""
    reference = path.with_name("reference")
    BrainstacksConfig.for_library("tiny", "../library").save_pretrained(str(reference))
    for folder in (path, reference):
        replace(path, WEIGHTS, b"\x08" + bytes(7) + b'{"a": 1}')
        (reference / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes())
        if not listed:
            change_manifest(path, lambda manifest: manifest.update(root={}))
        with pytest.raises(ValueError, match=rf"{folder.name}/{WEIGHTS} is damaged.*restore"):
            load(folder)


def test_verify_asks_that_the_root_names_its_own_folder(path: Path) -> None:
    change_config(path, "", {"library": "../elsewhere"})
    (problem,) = Library.open(path).verify()
    assert "'../elsewhere' instead of '.'" in problem and "axolotl train" in problem


def test_a_config_without_stack_or_library_is_refused(path: Path, load: Load, tmp_path: Path) -> None:
    BrainstacksConfig.for_library("tiny", "library").save_pretrained(str(tmp_path))
    save_file({}, tmp_path / WEIGHTS)
    assert tuner_of(load(tmp_path)).resident is not None
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["library"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no key `library`"):
        load(tmp_path)
    assert config["target_modules"] == DUMMY_TARGET_MODULES


def test_a_base_model_that_is_wrapped_already_is_refused(path: Path, base: LlamaForCausalLM) -> None:
    """Two libraries would answer at once."""
    used = copy.deepcopy(base)
    PeftModel.from_pretrained(used, str(path))
    with (
        pytest.raises(ValueError, match=r"carries Brainstacks already.*load the base model again"),
        pytest.warns(UserWarning),
    ):
        PeftModel.from_pretrained(used, str(path))


def test_what_training_leaves_loads_though_the_vocabulary_was_resized(
    path: Path, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    """PEFT would save the embeddings with it."""
    folder, grown = tmp_path / "base", copy.deepcopy(base)
    base.save_pretrained(folder)
    grown.resize_token_embeddings(100)
    model = get_peft_model(grown, BrainstacksConfig(task_type="CAUSAL_LM"))
    stand_for_library(model, "default", str(folder), "library")
    model.save_pretrained(str(tmp_path / "out"))
    assert load_file(tmp_path / "out" / WEIGHTS) == {}
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["library"] == "library" and config["target_modules"] == DUMMY_TARGET_MODULES


def test_a_checkpoint_of_a_resized_vocabulary_still_loads_to_train_on(tmp_path: Path) -> None:
    torch.manual_seed(6)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    grown = load_base(tmp_path / "base")
    grown.resize_token_embeddings(70)
    model = wrap(grown, base_model_name_or_path=str(tmp_path / "base"))
    revive(model)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "checkpoint")
    again = load_base(tmp_path / "base")
    again.resize_token_embeddings(70)
    resumed = PeftModel.from_pretrained(again, str(tmp_path / "checkpoint"), is_trainable=True)
    assert torch.equal(resumed.get_input_embeddings().weight, model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="would replace a weight of the base model"):
        PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "checkpoint"))


# Stacks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_stack_with_nan_or_infinite_values_spoils_no_other_row(
    path: Path, load: Load, ids: Tensor, value: float, side: str
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in reversed(tensors) if f"_{side}." in key)
        tensors[key].view(-1)[-1] = value

    (name,) = own_stacks(Library.open(path), "math")
    change_tensors(path, f"stacks/{name}/", spoil)
    model = load(path)
    expected = model.generate(ids, domains={"chat": 1.0}, **GREEDY)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{name}.*brainstacks_{side}.*restore the file"):
            model.generate(ids, domains=[{"math": 1.0}, {"chat": 1.0}, {}], **GREEDY)
    assert torch.equal(model.generate(ids, domains={"chat": 1.0}, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_stack_of_integers_is_refused(path: Path, load: Load, dtype: torch.dtype) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        key = next(iter(tensors))
        tensors[key] = tensors[key].to(dtype)

    change_tensors(path, "stacks/s001_chat/", cast)
    with pytest.raises(ValueError, match=rf"s001_chat.*{dtype}.*restore"):
        load(path)


def test_a_tensor_under_two_keys_is_refused(path: Path, load: Load) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        key = next(iter(tensors))
        tensors[key.removeprefix("base_model.model.")] = tensors[key] * 2

    change_tensors(path, "stacks/s001_chat/", twice)
    with pytest.raises(ValueError, match=r"s001_chat.*is there twice"):
        load(path)


@pytest.mark.parametrize("key", ["x.brainstacks_A.weight\n", "\x1b[2Jx.brainstacks_C.weight", "lm_head.weight"])
def test_a_key_with_control_characters_is_printed_escaped(path: Path, load: Load, key: str) -> None:
    change_tensors(path, "stacks/s001_chat/", lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="no tensor of a Brainstacks adapter") as caught:
        load(path)
    assert repr(key) in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "2", "r is '2'.*int"), ("r", 2.0, r"r is 2\.0.*int"), ("r", True, "r is True"), ("r", None, "r is None"),
        ("r", 10**12, "shapes"), ("r", -1, "r is -1"), ("num_experts", [3], r"num_experts is \[3\]"),
        ("num_experts", 10**9, "shapes"), ("top_k", {}, "top_k is {}"), ("top_k", 4, "top_k is 4.*lower top_k"),
        ("lora_alpha", float("nan"), "NaN is no finite"), ("lora_alpha", float("inf"), "Infinity is no finite"),
        ("lora_alpha", "16", "lora_alpha is '16'"), ("lora_alpha", 1e300, r"lora_alpha is 1e\+300"),
        ("use_rslora", "no", "use_rslora is 'no'.*bool"), ("use_rslora", 0, "use_rslora is 0.*bool"),
        ("lora_dropout", None, "lora_dropout is None"), ("lora_dropout", float("nan"), "NaN is no finite"),
        ("balance_coef", float("inf"), "Infinity is no finite"), ("balance_coef", "a", "balance_coef is 'a'"),
        ("target_modules", [1], r"target_modules is \[1\]"), ("target_modules", {"a": 1}, "target_modules is"),
        ("layers_to_transform", ["a"], "layers_to_transform is"), ("layers_pattern", 3, "layers_pattern is 3"),
        ("library", "..", "not the config of a stack"), ("peft_type", "LORA", "not the config of a stack"),
    ],
)  # fmt: skip
def test_wrong_values_in_a_stacks_config_are_named(
    path: Path, load: Load, key: str, value: object, message: str
) -> None:
    relative = f"stacks/s003_math/{CONFIG}"
    config = json.loads((path / relative).read_text()) | {key: value}
    replace(path, relative, json.dumps(config).encode())
    with pytest.raises(ValueError, match=rf"s003_math.*{message}"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"[]", b"7", b'"a"', b"", b"{", b"\xff", b"[" * 10**5], ids=lambda data: repr(data[:3])
)
def test_a_stacks_config_that_is_none_is_named(path: Path, load: Load, content: bytes) -> None:
    replace(path, f"stacks/s003_math/{CONFIG}", content)
    with pytest.raises(ValueError, match=r"s003_math.*(not the config of a stack|is damaged)"):
        load(path)


def test_a_stack_alone_is_made_no_larger_than_its_tensors(path: Path, load: Load) -> None:
    """PEFT makes it before it reads them: 10^7 ranks would take 20 GB."""
    change_config(path, "stacks/s001_chat/", {"r": 10**7})
    with pytest.raises(ValueError, match=r"rows, but r 10000000 and num_experts 3.*restore both files"):
        load(path / "stacks/s001_chat")


# Altered after it was loaded


def test_a_stack_that_was_altered_while_it_was_out_of_memory_is_refused(path: Path, load: Load, ids: Tensor) -> None:
    model = load(path)
    resident = tuner_of(model).resident
    assert resident is not None
    expected = model.generate(ids, domains={"math": 1.0}, **GREEDY)
    resident.max_bytes = resident.bytes
    model.generate(ids, domains={"chat": 1.0}, **GREEDY)
    assert resident.names == ["s001_chat"]
    file = path / "stacks/s003_math" / WEIGHTS
    whole = file.read_bytes()
    data = bytearray(whole)
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"s003_math.*altered"):
        model.generate(ids, domains={"math": 1.0}, **GREEDY)
    file.unlink()
    with pytest.raises(ValueError, match=r"s003_math.*missing"):
        model.generate(ids, domains={"math": 1.0}, **GREEDY)
    file.write_bytes(whole)
    assert torch.equal(model.generate(ids, domains={"math": 1.0}, **GREEDY), expected)


def test_a_file_that_did_not_change_is_hashed_once(path: Path, load: Load, ids: Tensor) -> None:
    """Touching it is taken for a change."""
    model = load(path)
    resident = tuner_of(model).resident
    assert resident is not None
    hashed: list[bool] = []
    read = Library.stack_tensors

    def counted(library: Library, name: str, verify: bool = True) -> dict[str, Tensor]:
        hashed.append(verify)
        return read(library, name, verify)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "stack_tensors", counted)
        model.generate(ids, domains={"math": 1.0}, **GREEDY)
        resident.max_bytes = resident.bytes
        for domain in ("chat", "math", "chat"):
            model.generate(ids, domains={domain: 1.0}, **GREEDY)
        assert hashed == [True, True, False, False]
        os.utime(path / "stacks/s003_math" / WEIGHTS)
        model.generate(ids, domains={"math": 1.0}, **GREEDY)
        assert hashed[-1]


SWAPPED = """
import sys, threading
from pathlib import Path
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.adapter import BrainstacksConfig
library = Library.open(sys.argv[1])
file = library.stack_path("s001_chat") / "adapter_config.json"
whole = file.read_bytes()
altered = whole.replace(b'"lora_alpha": 2', b'"lora_alpha": 9')
assert altered != whole
stop = threading.Event()
def swap():
    while not stop.is_set():
        for data in (altered, whole):
            other = file.with_suffix(".other"); other.write_bytes(data); other.replace(file)
thread = threading.Thread(target=swap); thread.start()
wrong = 0
for _ in range(3000):
    try:
        wrong += library.stack_config("s001_chat")["lora_alpha"] != 2
    except ValueError:
        pass
stop.set(); thread.join()
print("wrong", wrong)
"""


def test_the_config_that_was_checked_is_the_one_that_counts(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SWAPPED, path], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["wrong", "0"], done.stdout + done.stderr


# What is printed


def test_a_route_prints_no_control_characters() -> None:
    text = str(PromptRoute({"\x1b[31mchat\n": 1.0}))
    assert text.isprintable() and "chat" in text
