"""Ordinary PEFT LoRA adapters become domains of a library, with the outputs they had."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.base_models import make_old
from support.models import base_config, chat_dataset, write_rows
from support.processes import finish, start_train, train
from support.routed import VOCABULARY, new_library, tiny_base, tuner_of
from support.seeds import seeded_random
from support.wrapped import assert_near
from torch import Tensor
from transformers import LlamaForCausalLM

from axolotl_brainstacks import cli
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router_args import GateArgs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return folder


def fresh_base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def save_lora(folder: Path, base: Path, scale: float = 0.1, **options: Any) -> PeftModel:
    """Save a LoRA adapter with a random B, as a trainer would, and return the model that it is on."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | options)
    model = get_peft_model(fresh_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def run(library: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.library, [str(library), "import", *map(str, arguments)])


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 17))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 6, "lora_alpha": 5},
        {"target_modules": ["q_proj", "v_proj"], "r": 3},
        {"target_modules": ["q_proj", "lm_head"]},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
         "alpha_pattern": {"v_proj": 3, "layers.[02]{1}.*.q_proj": 1}},
        {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"o_proj": 1}, "use_rslora": True, "lora_dropout": 0.5},
        {"layers_to_transform": [1, 3], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_equal_pefts(base_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """On a new library, and beside another adapter."""
    other = save_lora(tmp_path / "other", base_dir, r=2)
    lora = save_lora(tmp_path / "lora", base_dir, **options)
    library = tmp_path / "library"
    for name, folder in (("first", "other"), ("second", "lora")):
        result = run(library, name, tmp_path / folder)
        assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(fresh_base(base_dir), str(library)).eval()
    ids = tokens()
    with torch.no_grad():
        plain = fresh_base(base_dir)(ids).logits
        for name, peft in (("first", other), ("second", lora)):
            expected = peft(ids).logits
            assert float((expected - plain).abs().max()) > 0.05
            with tuner_of(model).routed(domains={name: 1.0}):
                assert_near(model(ids).logits, expected, 1e-5)
        with tuner_of(model).routed(domains={}):
            assert torch.equal(model(ids).logits, plain)


def test_the_stack_is_a_peft_folder_of_its_own_with_rank_and_scale_kept(base_dir: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", base_dir, r=5, lora_alpha=7, use_rslora=True)
    assert run(tmp_path / "library", "sums", tmp_path / "lora").exit_code == 0
    library = Library.open(tmp_path / "library")
    (stack,), (domain,) = library.manifest.stacks, library.manifest.domains
    assert (stack.name, domain.name, domain.done, domain.context) == ("s001_sums", "sums", True, ["s001_sums"])
    config = library.stack_config(stack.name)
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["num_experts"]) == (5, 7, True, 1)
    alone = PeftModel.from_pretrained(fresh_base(base_dir), str(library.stack_path(stack.name))).eval()
    ids = tokens()
    with torch.no_grad():
        assert_near(alone(ids).logits, lora(ids).logits, 1e-5)
    assert library.verify() == []
    listing = CliRunner().invoke(cli.library, [str(library.path), "list"])
    assert "imported" in listing.output and "sums" in listing.output


def test_an_adapter_in_half_precision_comes_in_as_peft_reads_it(base_dir: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "lora", base_dir)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(file).items()}, file)
    lora = PeftModel.from_pretrained(fresh_base(base_dir), str(tmp_path / "lora")).eval()
    assert run(tmp_path / "library", "sums", tmp_path / "lora").exit_code == 0
    model = PeftModel.from_pretrained(fresh_base(base_dir), str(tmp_path / "library")).eval()
    ids = tokens()
    with torch.no_grad():
        assert_near(model(ids).logits, lora(ids).logits, 1e-5)


def test_imported_domains_are_routed_among(base_dir: Path, tmp_path: Path) -> None:
    loras = {name: save_lora(tmp_path / name, base_dir, r=seeded_random().randint(2, 6)) for name in ("poems", "sums")}
    library = new_library(tmp_path / "library", fresh_base(base_dir), ["chat"])
    base = make_old(library)
    gate = GateArgs(gate_threshold=0.5, weights="hard")
    Router.fresh(RouterConfig(domains=["chat"], features=32, width=16, dropout=0.0, gate=gate), 1).save(library)
    for name in loras:
        assert run(library.path, name, tmp_path / name).exit_code == 0
        assert Library.open(library.path).manifest.router.stale  # type: ignore[union-attr]
    library = Library.open(library.path)
    assert [entry.name for entry in library.manifest.domains] == ["chat", "poems", "sums"]
    assert library.manifest.base == base and base.weights is not None
    router = Router.fresh(
        RouterConfig(domains=["chat", "poems", "sums"], features=32, width=16, dropout=0.0, gate=gate), 2
    )
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCABULARY, "pad_token_id": 0}
    ids = tokens()
    for number, name in enumerate(loras, start=1):
        with torch.no_grad():
            router.network.outputs.weight.zero_()
            router.network.outputs.bias.copy_(torch.tensor([5.0 if i == number else -5.0 for i in range(3)]))
        router.save(library)
        model = PeftModel.from_pretrained(fresh_base(base_dir), str(library.path)).eval()
        assert [route.weights for route in tuner_of(model).route(ids)] == [{name: 1.0}] * 3
        assert torch.equal(model.generate(ids, **how), loras[name].generate(input_ids=ids, **how))


def test_loras_trained_by_axolotl_become_domains_with_a_router(tiny_llama_dir: Path, tmp_path: Path) -> None:
    names = ("poems", "sums")
    data = {name: chat_dataset(write_rows(tmp_path / f"{name}.jsonl", 30, Random(name))) for name in names}
    for name in names:
        config = base_config(tiny_llama_dir, tmp_path / name, adapter="lora", datasets=[data[name]], lora_r=8)
        train(config | {"learning_rate": 0.01, "max_steps": 10}, tmp_path / f"{name}-run")
        assert run(tmp_path / "library", name, tmp_path / name).exit_code == 0
    model = PeftModel.from_pretrained(fresh_base(tiny_llama_dir), str(tmp_path / "library")).eval()
    ids = tokens()
    with torch.no_grad():
        plain = fresh_base(tiny_llama_dir)(ids).logits
        for name in names:
            lora = PeftModel.from_pretrained(fresh_base(tiny_llama_dir), str(tmp_path / name)).eval()
            expected = lora(ids).logits
            assert float((expected - plain).abs().max()) > 0.01
            with tuner_of(model).routed(domains={name: 1.0}):
                assert_near(model(ids).logits, expected, 1e-5)
    router = {"samples": 12, "width": 16, "epochs": 2, "mixed_pairs": 2}
    domains = [{"name": name, "datasets": [data[name]]} for name in names]
    block = {"library": str(tmp_path / "library"), "domains": domains, "router": router}
    config = base_config(tiny_llama_dir, tmp_path / "out", adapter="brainstacks", brainstacks=block, val_set_size=0.2)
    finish([start_train(config, tmp_path, "router")], tmp_path)
    model = PeftModel.from_pretrained(fresh_base(tiny_llama_dir), str(tmp_path / "library")).eval()
    assert len(tuner_of(model).route(ids)) == len(ids)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    change(config)
    path.write_text(json.dumps(config))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
REFUSED: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "DoRA": ("`use_dora` is true", lambda f, base: save_lora(f, base, use_dora=True)),
    "bias": ("`bias` is \"all\"", lambda f, base: save_lora(f, base, bias="all")),
    "LoRA bias": ("`lora_bias` is true", lambda f, base: save_lora(f, base, lora_bias=True)),
    "whole modules": (
        r"`modules_to_save` is \[\"lm_head\"\]", lambda f, base: save_lora(f, base, modules_to_save=["lm_head"]),
    ),
    "trainable tokens": (
        "`trainable_token_indices`", lambda f, base: save_lora(f, base, trainable_token_indices=[1, 2]),
    ),
    "parameters": (
        "`target_parameters`",
        lambda f, base: save_lora(f, base, target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    ),
    "embedding": (
        "embed_tokens.lora_embedding_A", lambda f, base: save_lora(f, base, target_modules=["embed_tokens", "q_proj"]),
    ),
    "an option of tomorrow": ("`use_xora` is 3", lambda f, base: rewrite(f, lambda c: c.update(use_xora=3))),
    "a changed base": ("`init_lora_weights` is pissa", lambda f, base: rewrite(f, lambda c: c.update(init_lora_weights="pissa"))),
    "another method": ("`peft_type` is IA3", lambda f, base: rewrite(f, lambda c: c.update(peft_type="IA3"))),
    "no config": ("is no PEFT adapter", lambda f, base: (f / "adapter_config.json").unlink()),
    "no config in its file": (
        "is no PEFT adapter", lambda f, base: (f / "adapter_config.json").write_text("[1]"),
    ),
    "no tensors": ("adapter_model.safetensors is missing", lambda f, base: (f / "adapter_model.safetensors").unlink()),
    "no such base": (
        "cannot be loaded.*--base-model", lambda f, base: rewrite(f, lambda c: c.update(base_model_name_or_path="/nowhere")),
    ),
    "no such module": (
        "no module .model.layers.9.self_attn.q_proj",
        lambda f, base: retensor(f, lambda t: t.update({
            Q0.replace(".0.", ".9.") + side + ".weight": t[Q0 + side + ".weight"].clone() for side in "AB"})),
    ),
    "no linear module": (
        "cannot wrap model.norm",
        lambda f, base: retensor(f, lambda t: t.update({
            "base_model.model.model.norm.lora_A.weight": torch.randn(4, 32),
            "base_model.model.model.norm.lora_B.weight": torch.randn(32, 4)})),
    ),
    "another shape": (
        "self_attn.q_proj have shapes", lambda f, base: retensor(f, lambda t: t.update({Q0 + "A.weight": torch.randn(4, 31)})),
    ),
    "another rank": (
        "no A and B of one rank", lambda f, base: retensor(f, lambda t: t.update({Q0 + "A.weight": torch.randn(3, 32)})),
    ),
    "a name with a line break": (
        r"q_proj\.lora_B\.weight\\n` is no A or B",
        lambda f, base: retensor(f, lambda t: t.update({Q0 + "B.weight\n": t[Q0 + "B.weight"].clone() * 100})),
    ),
    "half a pair": ("no A and B of one rank", lambda f, base: retensor(f, lambda t: t.pop(Q0 + "B.weight"))),
    "not finite": ("NaN or infinite", lambda f, base: retensor(f, lambda t: t[Q0 + "B.weight"].fill_(torch.nan))),
    "no alpha": ("`lora_alpha` is not what PEFT writes", lambda f, base: rewrite(f, lambda c: c.pop("lora_alpha"))),
    "alpha zero": ("`lora_alpha` is not what PEFT writes", lambda f, base: rewrite(f, lambda c: c.update(lora_alpha=0))),
    "alpha true": ("`lora_alpha` is not what PEFT writes", lambda f, base: rewrite(f, lambda c: c.update(lora_alpha=True))),
    "alphas of a word": (
        "`alpha_pattern.q_proj`", lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={"q_proj": "8"})),
    ),
    "a class as in POSIX": (
        r"`q_\[\[:alpha:\]\]roj`.*POSIX",
        lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={"q_[[:alpha:]]roj": 8})),
    ),
    "a list of alphas": ("`alpha_pattern`", lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern=[1]))),
    "no regular expression": (
        r"`alpha_pattern` has the key `q_\(proj`, which is no",
        lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={"q_(proj": 8})),
    ),
    "an expression that takes for ever": (
        "takes longer than 5 s", lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={r"(\w|[a-z]|\.|_)+[^j]": 8})),
    ),
    "an expression that is too long": (
        "longer than 1000", lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={"q" * 5000: 8})),
    ),
    "repeats of repeats": (
        "more than 10000 repeats",
        lambda f, base: rewrite(f, lambda c: c.update(alpha_pattern={"(?:(?:q{1000}){1000}){1000}": 8})),
    ),
    "no base's name": (
        "cannot be loaded.*--base-model", lambda f, base: rewrite(f, lambda c: c.pop("base_model_name_or_path")),
    ),
    "a number for the base": (
        "`base_model_name_or_path` is not", lambda f, base: rewrite(f, lambda c: c.update(base_model_name_or_path=7)),
    ),
    "a deep config": ("nested deeper", lambda f, base: (f / "adapter_config.json").write_text("[" * 10**5)),
    "text that steers the terminal": (
        r"`\\x1b\[2J` is .*u001b\[3J", lambda f, base: rewrite(f, lambda c: c.update({"\x1b[2J": "\x1b[3J"})),
    ),
    "one dimension": (
        r"is a tensor of .* shape \[128\]",
        lambda f, base: retensor(f, lambda t: t.update({Q0 + "A.weight": torch.randn(128)})),
    ),
    "integers": (
        "is a tensor of torch.int32",
        lambda f, base: retensor(f, lambda t: t.update({Q0 + "A.weight": torch.ones(4, 32).int()})),
    ),
    "a fifo": (
        "is no regular file",
        lambda f, base: [(f / "adapter_model.safetensors").unlink(), os.mkfifo(f / "adapter_model.safetensors")],
    ),
    "untrained": (
        "every B matrix is zero",
        lambda f, base: retensor(f, lambda t: [b.zero_() for key, b in t.items() if "lora_B" in key]),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_no_stack_can_equal_is_refused(case: str, base_dir: Path, tmp_path: Path) -> None:
    message, make = REFUSED[case]
    save_lora(tmp_path / "lora", base_dir)
    library = new_library(tmp_path / "library", fresh_base(base_dir), ["chat"])
    before = contents(library.path)
    make(tmp_path / "lora", base_dir)
    for path in (library.path, tmp_path / "new"):
        result = run(path, "sums", tmp_path / "lora")
        assert result.exit_code == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(result.output.replace("\n", " "))
    assert contents(library.path) == before
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_another_base_model_is_refused_and_the_same_one_elsewhere_is_not(base_dir: Path, tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", fresh_base(base_dir), ["chat"])
    before = contents(library.path)
    tiny_base().save_pretrained(tmp_path / "twin")
    save_lora(tmp_path / "lora", tmp_path / "twin")
    result = run(library.path, "sums", tmp_path / "lora")
    assert result.exit_code == 1 and "same architecture with other weights" in result.output
    assert contents(library.path) == before
    shutil.rmtree(tmp_path / "twin")
    assert run(library.path, "sums", tmp_path / "lora", "--base-model", base_dir).exit_code == 0


@pytest.mark.parametrize("change", [
    {"num_attention_heads": 0}, {"hidden_size": "x"}, {"dtype": "nothing"}, {"quantization_config": {"quant_method": "aqlm"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"weights": b"junkjunkjunkjunk"},
], ids=str)  # fmt: skip
def test_a_strangers_base_model_fails_in_one_line(base_dir: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    save_lora(tmp_path / "lora", base_dir)
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    if "weights" in change:
        (base / "model.safetensors").write_bytes(change["weights"])
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | change))
    result = run(tmp_path / "library", "sums", tmp_path / "lora", "--base-model", base)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    error = result.output[result.output.index("Error: ") :]
    assert str(base) in error and "cannot be loaded" in error and "--base-model" in error and error.count("\n") == 1


def test_names_that_are_taken_or_cannot_be_are_refused(base_dir: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "lora", base_dir)
    library = new_library(tmp_path / "library", fresh_base(base_dir), ["chat"])
    before = contents(library.path)
    for name, message in (("chat", "a domain `chat` already"), ("Big Sums", "`Big Sums` cannot be a domain's name")):
        result = run(library.path, name, tmp_path / "lora")
        assert result.exit_code == 1 and message in result.output
    assert contents(library.path) == before
