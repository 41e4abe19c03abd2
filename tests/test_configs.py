"""The example configs, through Axolotl's own path, and run.

The hub is out of reach here: a tiny model of the same family stands in for each base model, and files with the hub's
columns and fresh random rows for the datasets.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from agreement import with_engine
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import SFTDataset
from axolotl.utils.tee import close_debug_log
from datasets import Dataset
from models import run_axolotl, tiny_llama
from peft import PeftModel
from processes import train, train_ranks
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.stages import stage_config
from axolotl_brainstacks.evaluation import IGNORED
from axolotl_brainstacks.library import Library

FOLDER = Path(__file__).parents[1] / "example_configs"
EXAMPLES = sorted(path.stem.removeprefix("brainstacks_") for path in FOLDER.glob("*.yml"))
# Of hub datasets: the columns with the question and the answer, and one that must not be trained on.
COLUMNS = {
    "tatsu-lab/alpaca": ("instruction", "output", "text"),
    "iamtarun/python_code_instructions_18k_alpaca": ("instruction", "output", "prompt"),
    "medalpaca/medical_meadow_medical_flashcards": ("input", "output", "instruction"),
    "openai/gsm8k": ("question", "answer", None),
    "garage-bAInd/Open-Platypus": ("instruction", "output", "data_source"),
}
MESSAGES = {"HuggingFaceH4/ultrachat_200k", "HuggingFaceTB/smoltalk"}
# What a CPU and a tiny model need; everything else is run as the files have it.
SMALL = {
    "bf16": False, "tf32": False, "sequence_len": 256, "max_steps": 2, "eval_steps": 2, "save_steps": 2,
    "gradient_accumulation_steps": 1, "val_set_size": 0.25, "learning_rate": 0.01, "warmup_ratio": 0.0,
    "dataset_num_proc": 0,
}  # fmt: skip

# Packing does not take 0 processes to map with; and in processes of its own it would compile itself every time.
PACKED = {"dataset_num_proc": 1, "sample_packing_sequentially": True}


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"brainstacks_{name}.yml").read_text())


def domain_entries(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a config that have `datasets:`."""
    return config["brainstacks"].get("domains") or [config]


def random_words(rng: Random) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=4)) for _ in range(rng.randint(2, 4)))


def hub_row(path: str, rng: Random) -> tuple[dict[str, Any], tuple[str, str]]:
    """A row as the hub's dataset has it, and its (question, answer)."""
    question, answer = random_words(rng), random_words(rng)
    if path in MESSAGES:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns}, (question, answer)
    asked, answered, other = COLUMNS[path]
    row = {asked: question, answered: answer} | ({other: "not to be seen"} if other else {})
    # Alpaca's form has an input in some rows; here it stays empty, as in most of them.
    return row | ({"input": ""} if asked == "instruction" else {}), (question, answer)


def localised(config: dict[str, Any], model: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Point `config` at local stand-ins, small enough for a CPU. Returns every domain's questions and their answers."""
    config |= SMALL | {"base_model": str(model), "output_dir": str(folder / "out")}
    config.pop("deepspeed", None)
    config["dataset_prepared_path"] = str(folder / "prepared")
    block = config["brainstacks"]
    block |= {"library": str(folder / "library"), "eval_rows": 4, "samples": {"prompts": 0}}
    block |= {"null_space": {"directions": 4, "samples": 8}, "boosting": {"max_rounds": 1}}
    rng, answers = Random(), {}
    for entry in domain_entries(config):
        name = entry.get("name") or block["domain"]
        (dataset,) = entry["datasets"]
        rows = [hub_row(dataset["path"], rng) for _ in range(16)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
        answers[name] = dict(pair for _, pair in rows)
        dataset |= {"path": str(file), "ds_type": "json", "split": "train"}
        dataset.pop("name", None)
    return answers


def load(config: dict[str, Any]) -> tuple[DictDefault, Plan]:
    """What `axolotl train` does with a config before it loads data."""
    cfg = load_cfg(DictDefault(config))
    close_debug_log()
    plan = PluginManager.get_instance().plugins["axolotl_brainstacks.BrainstacksPlugin"].plan
    assert isinstance(plan, Plan)
    return cfg, plan


@pytest.fixture(scope="module")
def tiny_gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 with a vision tower, its processor, and a tokenizer that knows Gemma's turns."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    folder = tmp_path_factory.mktemp("tiny_gemma")
    image = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_llama(tmp_path_factory.mktemp("llama")),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=image,
    )  # fmt: skip
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    ids = {f"{key}_index": tokenizer.convert_tokens_to_ids(token) for key, token in image.items()}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 64,
        "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    Gemma3Processor(Gemma3ImageProcessor(), tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tiny_llama_dir: Path, tiny_gemma_dir: Path) -> dict[str, Path]:
    return {name: tiny_gemma_dir if name == "gemma" else tiny_llama_dir for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_axolotl_accepts_every_stage(name: str, stand_ins: dict[str, Path], tmp_path: Path) -> None:
    config = example(name) | {"base_model": str(stand_ins[name]), "output_dir": str(tmp_path)}
    config.pop("deepspeed", None)  # it would start here; the two processes below have it
    cfg, plan = load(config)
    assert cfg.adapter == ("qlora" if config.get("load_in_4bit") else "lora")
    for domain, entry in zip(plan.block.curriculum, domain_entries(config), strict=True):
        stage = stage_config(plan.raw, domain)
        assert [dataset.path for dataset in stage.datasets] == [dataset["path"] for dataset in entry["datasets"]]
        assert bool(stage.load_in_4bit) == config.get("load_in_4bit", False)
        assert (stage.learning_rate, stage.max_steps) == (config["learning_rate"], config["max_steps"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_no_key_that_axolotl_would_ignore(name: str) -> None:
    config = example(name)
    assert set(config) - {"brainstacks"} <= set(AxolotlInputConfig.model_fields)
    for entry in domain_entries(config):
        for dataset in entry["datasets"] + entry.get("test_datasets", []):
            assert set(dataset) <= set(SFTDataset.model_fields)


def documented(block: type[BaseModel] = BrainstacksBlock, prefix: str = "") -> Iterator[str]:
    """The rows of README.md's table of keys."""
    for name, field in block.model_fields.items():
        kind, default = field.annotation, field.get_default(call_default_factory=True)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from documented(kind, f"{prefix}{name}.")
        else:
            shown = "" if default is None else f"`{json.dumps(default).replace('"', '')}`"
            yield f"| `{prefix}{name}` | {shown} | {field.description} |"


def test_the_readme_lists_every_key_and_its_config_is_valid(tiny_llama_dir: Path, tmp_path: Path) -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    table = readme.partition("| key of `brainstacks:` | default | |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == list(documented())

    config = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    config |= {"base_model": str(tiny_llama_dir), "output_dir": str(tmp_path)}
    _, plan = load(config)
    assert [domain.name for domain in plan.block.curriculum] == ["chat", "code"]
    for domain in plan.block.curriculum:
        stage_config(plan.raw, domain)


def test_gemma_has_the_papers_settings() -> None:
    config = example("gemma")
    block = config["brainstacks"]
    assert (config["lora_r"], config["lora_alpha"], config["load_in_4bit"]) == (16, 16, True)
    assert (block["num_experts"], block["top_k"], block["balance_coef"]) == (4, 2, 0.01)
    assert block["boosting"] == {"max_rounds": 2, "min_loss_delta": 0.002, "patience": 4, "spike_threshold": 0.1}
    assert (block["null_space"]["directions"], block["null_space"]["samples"]) == (64, 400)
    assert [domain["name"] for domain in block["domains"]] == ["chat", "code", "math", "medical", "reasoning"]


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("tinyllama", "<|user|>\n{}</s>\n<|assistant|>\n"),
        ("gemma", "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"),
        ("stack_onto", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
        ("deepspeed", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    ],
    ids=["tinyllama", "gemma", "stack_onto", "deepspeed"],
)
def test_answers_and_nothing_else_are_learned(
    name: str, turns: str, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    """Every hub dataset's columns end up where they should, all domains of a file in one prompt format."""
    config = example(name)
    answers = localised(config, stand_ins[name], tmp_path)
    _, plan = load(config)
    for domain in plan.block.curriculum:
        stage = stage_config(plan.raw, domain)
        tokenizer = load_tokenizer(stage)
        raw = Dataset.from_json(stage.datasets[0].path, cache_dir=str(tmp_path / "cache"))
        rows, _ = get_dataset_wrapper(stage.datasets[0], tokenizer, stage, None, raw)
        assert len(rows) == 16
        for row in rows:
            learned = [label for label in row["labels"] if label != IGNORED]
            prompt = tokenizer.decode(row["input_ids"][: row["labels"].index(learned[0])])
            question = next(question for question in answers[domain.name] if question in prompt)
            assert prompt == turns.format(question)
            assert tokenizer.decode(learned) == answers[domain.name][question] + tokenizer.eos_token


def test_one_more_domain_with_sample_packing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """brainstacks_stack_onto.yml by the commands as a user types them, onto a library of brainstacks_tinyllama.yml.

    `preprocess` trains nothing, an option beats the file, and folders may have spaces in their names.
    """
    folder = tmp_path / "my experiments"
    folder.mkdir()
    first = example("tinyllama")
    first["brainstacks"]["domains"] = first["brainstacks"]["domains"][:1]
    localised(first, tiny_llama_dir, folder)
    train(first, folder)
    before = Library.open(folder / "library").manifest
    assert [stack.name for stack in before.stacks] == ["s001_chat"]

    config = example("stack_onto")
    localised(config, tiny_llama_dir, folder)
    assert config["sample_packing"] is True
    config |= PACKED | {"sequence_len": 96, "val_set_size": 0.5}  # a batch that short rows do not fill is left out
    path = folder / "my config.yml"
    path.write_text(yaml.safe_dump(config))
    prepared = len(list((folder / "prepared").iterdir()))
    run_axolotl(["preprocess", path], tmp_path)
    assert Library.open(folder / "library").manifest == before and len(list((folder / "prepared").iterdir())) > prepared
    run_axolotl(["train", path, "--max-steps", "3"], tmp_path)
    library = Library.open(folder / "library")
    assert library.verify() == []
    assert [domain.name for domain in library.manifest.domains] == ["chat", "summaries"]
    assert library.manifest.domains[0] == before.domains[0]
    # A random model may learn nothing from few rows; then the round is recorded and its stack is not kept.
    (summaries,) = library.manifest.domains[1:]
    assert summaries.done and [record.steps for record in summaries.rounds] == [3]
    names = ["s001_chat", *(record.stack for record in summaries.rounds if record.kept)]
    assert [stack.name for stack in library.manifest.stacks] == names
    assert library.manifest.stacks[0] == before.stacks[0]

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokens = torch.randint(0, 500, (2, 9))
    with torch.no_grad():
        plain = base(tokens).logits
        loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
        assert not torch.equal(loaded(tokens).logits, plain)
    assert [stack.name for stack in loaded.base_model.stacks] == names


def test_deepspeed_with_sample_packing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """brainstacks_deepspeed.yml on two processes: first with too few rows to pack, then with enough."""
    config = example("deepspeed")
    engine = Path(config["deepspeed"]).stem
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    localised(config, tiny_llama_dir, tmp_path)
    config = with_engine(config, engine, tmp_path) | PACKED
    alone = copy.deepcopy(config)
    del alone["brainstacks"]["domains"][1]
    log = train_ranks(alone, tmp_path, expect=1)
    assert "The rows of `datasets` of domain `chat` do not fill one batch on each of 2 processes" in log
    assert Library.open(tmp_path / "library").manifest.domains == []

    log = train_ranks(config | {"micro_batch_size": 1, "sequence_len": 96}, tmp_path)
    assert "2 processes, DeepSpeedEngine, ZeRO stage 2" in log
    library = Library.open(tmp_path / "library")
    assert library.verify() == []
    assert [domain.done for domain in library.manifest.domains] == [True, True]
    assert library.manifest.domains[0].rounds[0].steps == 2


def test_multimodal_gemma_in_4bit(tiny_gemma_dir: Path, tmp_path: Path) -> None:
    """brainstacks_gemma.yml with a domain of each kind of data; the vision tower is left alone."""
    config = example("gemma")
    domains = config["brainstacks"]["domains"]
    config["brainstacks"]["domains"] = [domains[0], domains[3]]
    config["brainstacks"]["router"]["soft_domains"] = []
    localised(config, tiny_gemma_dir, tmp_path)
    train(config | {"max_steps": 6, "eval_steps": 3}, tmp_path)
    library = Library.open(tmp_path / "library")
    assert library.verify() == []
    assert [domain.done for domain in library.manifest.domains] == [True, True]
    kept = [record.stack for domain in library.manifest.domains for record in domain.rounds if record.kept]
    assert "s001_chat" in kept and [stack.name for stack in library.manifest.stacks] == kept
    for stack in library.manifest.stacks:
        assert {".".join(key.split(".")[2:5]) for key in library.stack_tensors(stack.name)} == {
            "model.language_model.layers"
        }
    base = AutoModelForImageTextToText.from_pretrained(tiny_gemma_dir, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(library.path)).eval()
    assert loaded(torch.randint(0, 500, (1, 7))).logits.isfinite().all()
