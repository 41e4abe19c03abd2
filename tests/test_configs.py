"""The example configs, through Axolotl's own path, and run.

The hub is out of reach here: a tiny model of the same family stands in for each base model, and files with the hub's
columns and fresh random rows for the datasets.
"""

import copy
import functools
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from axolotl.cli import inference
from axolotl.cli.args import InferenceCliArgs
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import SFTDataset
from axolotl.utils.tee import close_debug_log
from datasets import Dataset
from peft import PeftModel
from support.agreement import with_engine
from support.documents import blocks
from support.models import run_axolotl, tiny_llama
from support.processes import train, train_ranks
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.stages import stage_config
from axolotl_brainstacks.evaluation import IGNORED
from axolotl_brainstacks.library import Library

FOLDER = Path(__file__).parents[1] / "example_configs"
EXAMPLES = sorted(path.stem.removeprefix("brainstacks_") for path in FOLDER.glob("*.yml"))
NOISE = "not to be seen"
# Datasets of chats: the column, and its keys for role and text.
CHATS = {
    "HuggingFaceH4/ultrafeedback_binarized": ("messages", "role", "content"),
    "HuggingFaceH4/ultrachat_200k": ("messages", "role", "content"),
    "HuggingFaceTB/smoltalk": ("messages", "role", "content"),
    "AI-MO/NuminaMath-CoT": ("messages", "role", "content"),
    "open-thoughts/OpenThoughts-114k": ("conversations", "from", "value"),
    "NovaSky-AI/Sky-T1_data_17k": ("conversations", "from", "value"),
}
# Their system prompts are the same in all rows.
WITH_SYSTEM = {"open-thoughts/OpenThoughts-114k", "NovaSky-AI/Sky-T1_data_17k"}
# What a CPU and a tiny model need; everything else is run as the files have it.
SMALL = {
    "bf16": False, "tf32": False, "sequence_len": 256, "max_steps": 2, "eval_steps": 2, "save_steps": 2,
    "gradient_accumulation_steps": 1, "val_set_size": 0.25, "learning_rate": 0.01, "dataset_num_proc": 0,
}  # fmt: skip
UNPACKED = {"sample_packing": False, "eval_sample_packing": False}
# Packing does not take 0 processes to map with; and in processes of its own it would compile itself every time. A batch
# that short rows do not fill is left out.
PACKED = {
    "dataset_num_proc": 1, "sample_packing_sequentially": True, "micro_batch_size": 1, "eval_batch_size": 1,
    "sequence_len": 96, "val_set_size": 0.5,
}  # fmt: skip


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"brainstacks_{name}.yml").read_text())


def domain_entries(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a config that have `datasets:`."""
    return config["brainstacks"].get("domains") or [config]


def random_words(rng: Random) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=4)) for _ in range(rng.randint(2, 4)))


def hub_row(path: str, rng: Random) -> tuple[dict[str, Any], tuple[str, str]]:
    """A row as the hub's dataset has it, and the (question, answer) that should be made of it."""
    question, answer = random_words(rng), random_words(rng)
    if path in CHATS or path.startswith(".demo"):
        column, role, text = CHATS.get(path, ("messages", "role", "content"))
        turns = [{role: "user", text: question}, {role: "assistant", text: answer}]
        return {column: turns} | ({"system": NOISE} if path in WITH_SYSTEM else {}), (question, answer)
    match path:
        case "tatsu-lab/alpaca":
            row = {"instruction": question, "input": "", "output": answer, "text": NOISE}
        case "iamtarun/python_code_instructions_18k_alpaca":
            # Some rows have an input.
            first, given = question.split(" ", 1)
            row = {"instruction": first, "input": given, "output": answer, "prompt": NOISE}
            question = f"{first}\n\n{given}"
        case "GBaker/MedQA-USMLE-4-options":
            options = {letter: random_words(rng) for letter in "ABCD"} | {"C": answer}
            row = {"question": question, "options": options, "answer": answer, "answer_idx": "C", "meta_info": NOISE}
            listed = "\n".join(f"{letter}. {option}" for letter, option in options.items())
            question, answer = f"{question}\n\n{listed}", f"C. {answer}"
        case "FreedomIntelligence/medical-o1-reasoning-SFT":
            row = {"Question": question, "Complex_CoT": NOISE, "Response": answer}
        case "qiaojin/PubMedQA":
            abstract = random_words(rng)
            context = {"contexts": [abstract, NOISE], "labels": ["BACKGROUND", "METHODS"]}
            row = {"pubid": 1, "question": question, "context": context, "long_answer": answer, "final_decision": "yes"}
            question = f"{question}\n\n{abstract}"
        case "openai/gsm8k":
            row = {"question": question, "answer": answer}
        case _:
            raise AssertionError(f"no stand-in for {path}")
    return row, (question, answer)


def localised(config: dict[str, Any], model: Path, folder: Path, rows: int = 16) -> dict[str, dict[str, str]]:
    """Point `config` at local stand-ins, small enough for a CPU. Returns every domain's questions and their answers."""
    config |= SMALL | {"base_model": str(model), "output_dir": str(folder / "out")}
    if config.get("load_in_4bit"):
        config["optimizer"] = "adamw_torch"  # paged memory is a GPU's
    for key in ("deepspeed", "warmup_ratio", "warmup_steps"):
        config.pop(key, None)
    config["dataset_prepared_path"] = str(folder / "prepared")
    block = config["brainstacks"]
    block |= {"library": str(folder / "library"), "eval_rows": 4, "samples": {"prompts": 0}}
    block |= {"null_space": {"directions": 4, "samples": 8}, "boosting": {"max_rounds": 1}}
    answers: dict[str, dict[str, str]] = {}
    for entry in domain_entries(config):
        name = entry.get("name") or block["domain"]
        rng, answers[name] = Random(name), {}
        entry.pop("test_datasets", None)
        for number, dataset in enumerate(entry["datasets"]):
            made = [hub_row(dataset["path"], rng) for _ in range(rows)]
            file = folder / f"{name}-{number}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row, _ in made))
            answers[name] |= dict(pair for _, pair in made)
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


# What TinyLlama's own template writes; there is no BOS token in it, although the tokenizer puts one before plain text.
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_tinyllama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer has TinyLlama's special tokens and chat template."""
    from tokenizers.processors import TemplateProcessing

    folder = tiny_llama(tmp_path_factory.mktemp("tiny_tinyllama"))
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = ZEPHYR
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tiny_llama_dir: Path, tiny_tinyllama_dir: Path, tiny_gemma_dir: Path) -> dict[str, Path]:
    special = {"gemma": tiny_gemma_dir, "tinyllama": tiny_tinyllama_dir, "stack_onto": tiny_tinyllama_dir}
    return {name: special.get(name, tiny_llama_dir) for name in EXAMPLES}


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
        assert (stage.learning_rate, stage.max_steps) == (
            config["learning_rate"], entry.get("max_steps", config["max_steps"])
        )  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_no_key_that_axolotl_would_ignore(name: str) -> None:
    config = example(name)
    assert set(config) - {"brainstacks"} <= set(AxolotlInputConfig.model_fields)
    for entry in domain_entries(config):
        for dataset in entry["datasets"] + entry.get("test_datasets", []):
            assert set(dataset) <= set(SFTDataset.model_fields)


COMPLETE = [text for _, text in blocks("yaml") if "base_model:" in text]


@pytest.mark.parametrize("text", COMPLETE)
def test_complete_configs_in_the_documents_are_valid(text: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(text)
    assert set(config) - {"brainstacks"} <= set(AxolotlInputConfig.model_fields)
    names = [entry["name"] for entry in config["brainstacks"]["domains"]]
    config |= {"base_model": str(tiny_llama_dir), "output_dir": str(tmp_path)}
    config["brainstacks"]["library"] = str(tmp_path / "library")
    _, plan = load(config)
    assert [domain.name for domain in plan.block.curriculum] == names
    for domain in plan.block.curriculum:
        stage_config(plan.raw, domain)


# What the paper trained with: the key as Axolotl or the `brainstacks:` block has it, TinyLlama's value, Gemma's.
PAPER: list[tuple[str, Any, Any]] = [
    ("load_in_4bit", True, True),
    ("lora_r", 16, 16),
    ("lora_alpha", 16, 16),
    ("sequence_len", 512, 512),
    ("sample_packing", True, True),
    ("micro_batch_size", 4, 4),
    ("gradient_accumulation_steps", 4, 4),
    ("lr_scheduler", "linear", "linear"),
    ("warmup_steps", 40, 40),
    ("warmup_ratio", None, None),
    ("optimizer", "paged_adamw_8bit", "paged_adamw_8bit"),
    ("weight_decay", 0.01, 0.01),
    ("adam_beta1", 0.9, 0.9),
    ("adam_beta2", 0.95, 0.95),
    ("max_grad_norm", 1.0, 1.0),
    ("eval_steps", 50, 50),
    ("val_set_size", 0.02, 0.02),
    ("brainstacks.num_experts", 4, 4),
    ("brainstacks.top_k", 2, 2),
    ("brainstacks.noisy_gate", True, True),
    ("brainstacks.balance_coef", 0.01, 0.01),
    ("brainstacks.context", "curriculum", "curriculum"),
    ("brainstacks.boosting.min_loss_delta", 0.002, 0.002),
    ("brainstacks.boosting.patience", 4, 4),
    ("brainstacks.boosting.spike_threshold", 0.1, 0.1),
    ("brainstacks.null_space.directions", 32, 64),
    ("brainstacks.null_space.samples", 200, 400),
    ("brainstacks.router.search", "greedy", "greedy"),
    ("brainstacks.router.samples", 200, 200),
    ("brainstacks.router.min_gain", 0.01, 0.01),
    ("brainstacks.router.label_blend", 0.2, 0.2),
    ("brainstacks.router.width", 512, 512),
    ("brainstacks.router.max_tokens", 256, 256),
    ("brainstacks.router.epochs", 8, 8),
    ("brainstacks.router.batch_size", 16, 16),
    ("brainstacks.router.learning_rate", 8e-4, 8e-4),
    ("brainstacks.router.confidence_coef", 0.05, 0.05),
    ("brainstacks.router.weights", "soft", "soft"),
    ("brainstacks.router.gate_threshold", 0.12, 0.12),
    ("brainstacks.router.floors", {"chat": 0.2}, {"chat": 0.2}),
    ("brainstacks.router.soft_domains", [], ["reasoning"]),
]
# Of every domain, in order: rounds at most, steps a round.
PAPER_DOMAINS = {
    "tinyllama": {"chat": (3, 400), "code": (2, 400), "medical": (2, 400), "math": (2, 400)},
    "gemma": {"chat": (2, 500), "code": (2, 500), "math": (2, 500), "medical": (2, 500), "reasoning": (2, 600)},
}
PAPER_MEDICINE = {
    "GBaker/MedQA-USMLE-4-options", "FreedomIntelligence/medical-o1-reasoning-SFT", "qiaojin/PubMedQA",
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER_DOMAINS)
def test_the_papers_settings(name: str, stand_ins: dict[str, Path], tmp_path: Path) -> None:
    """As they hold for each domain, after Axolotl's validation and this package's."""
    _, plan = load(example(name) | {"base_model": str(stand_ins[name]), "output_dir": str(tmp_path)})
    assert [domain.name for domain in plan.block.curriculum] == list(PAPER_DOMAINS[name])
    for domain in plan.block.curriculum:
        stage, block = stage_config(plan.raw, domain), plan.block.settings_of(domain.name)
        for key, tinyllama, gemma in PAPER:
            path = key.removeprefix("brainstacks.").split(".")
            value = functools.reduce(getattr, path, block if key.startswith("brainstacks.") else stage)
            assert value == {"tinyllama": tinyllama, "gemma": gemma}[name], (domain.name, key)
        assert (block.boosting.max_rounds, stage.max_steps) == PAPER_DOMAINS[name][domain.name]
        assert block.eval_rows >= block.null_space.samples
        if domain.name == "medical":
            assert {dataset.path for dataset in stage.datasets} == PAPER_MEDICINE
    if name == "gemma":
        assert plan.raw["learning_rate"] == 1e-4
    assert plan.raw.get("train_on_inputs") is None  # named in the header as a deviation


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "demo"])  # whose few rows a CPU measures quickly
def test_rows_enough_are_kept_for_the_null_space(name: str) -> None:
    block = BrainstacksBlock.parse(example(name)["brainstacks"])
    for number, domain in enumerate(block.curriculum[1:], start=1):
        rows = [block.settings_of(earlier.name).eval_rows for earlier in block.curriculum[:number]]
        assert sum(rows) >= block.settings_of(domain.name).null_space.samples


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("tinyllama", "<|user|>\n{}</s>\n<|assistant|>\n"),
        ("gemma", "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"),
        ("stack_onto", "<|user|>\n{}</s>\n<|assistant|>\n"),
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
        for row in prepared_rows(stage, tmp_path):
            learned = [label for label in row["labels"] if label != IGNORED]
            prompt = tokenizer.decode(row["input_ids"][: row["labels"].index(learned[0])])
            question = next(question for question in answers[domain.name] if question in prompt)
            assert prompt == turns.format(question)
            assert tokenizer.decode(learned) == answers[domain.name][question] + tokenizer.eos_token


def prepared_rows(stage: DictDefault, folder: Path) -> list[dict[str, Any]]:
    """The rows of all datasets of a localised domain, as Axolotl prepares them."""
    tokenizer = load_tokenizer(stage)
    rows: list[dict[str, Any]] = []
    for dataset in stage.datasets:
        raw = Dataset.from_json(dataset.path, cache_dir=str(folder / "cache"))
        prepared, _ = get_dataset_wrapper(dataset, tokenizer, stage, None, raw)
        assert len(prepared) == len(raw) == 16
        rows += prepared
    return rows


class Prompted(Exception):
    """Carries the token ids that were to be answered."""


class Recorder:
    """In the place of a model that `axolotl inference` has loaded."""

    def __init__(self) -> None:
        self.training = False

    def to(self, *_: Any, **__: Any) -> "Recorder":
        return self

    def eval(self) -> "Recorder":
        return self

    def generate(self, inputs: torch.Tensor, **_: Any) -> None:
        raise Prompted(inputs[0].tolist())


@pytest.mark.parametrize("name", EXAMPLES)
def test_inference_prompts_as_training_does(
    name: str, stand_ins: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that the real `axolotl inference` makes of an instruction are those of a training row up to its answer."""
    config = example(name)
    answers = localised(config, stand_ins[name], tmp_path)
    _, plan = load(config)
    prompts = {
        domain.name: {
            tuple(row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != IGNORED)])
            for row in prepared_rows(stage_config(plan.raw, domain), tmp_path)
        }
        for domain in plan.block.curriculum
    }
    cfg = load_cfg(DictDefault(config), inference=True, rl=None)
    close_debug_log()
    monkeypatch.setattr(inference, "load_model_and_tokenizer", lambda **_: (Recorder(), load_tokenizer(cfg), None))
    for domain, rows in answers.items():
        made = set()
        for question in rows:
            monkeypatch.setattr("sys.stdin", io.StringIO(question))
            with pytest.raises(Prompted) as prompted:
                inference.do_inference(cfg=cfg, cli_args=InferenceCliArgs())
            made.add(tuple(prompted.value.args[0]))
        assert made == prompts[domain]


@pytest.mark.parametrize("name", PAPER_DOMAINS)
def test_rounds_that_help_give_the_papers_number_of_stacks(
    name: str, stand_ins: dict[str, Path], tmp_path: Path
) -> None:
    """Each domain's own rows are its validation rows, so that every round lowers the loss."""
    config = example(name)
    rounds = {entry["name"]: entry.get("brainstacks") for entry in config["brainstacks"]["domains"]}
    boosting = config["brainstacks"]["boosting"]
    localised(config, stand_ins[name], tmp_path, rows=4)
    config |= UNPACKED | {"learning_rate": 0.003, "max_steps": 4, "eval_steps": 4, "save_steps": 4}
    config["brainstacks"] |= {"boosting": boosting | {"min_loss_delta": 0.0}, "eval_rows": 64}
    for entry in config["brainstacks"]["domains"]:
        entry["test_datasets"] = copy.deepcopy(entry["datasets"])
        entry.pop("max_steps", None)
        assert entry.get("brainstacks") == rounds[entry["name"]]
    del config["val_set_size"]
    train(config, tmp_path)
    manifest = Library.open(tmp_path / "library").manifest
    kept = {entry.name: sum(record.kept for record in entry.rounds) for entry in manifest.domains}
    assert kept == {domain: rounds for domain, (rounds, _) in PAPER_DOMAINS[name].items()}
    assert len(manifest.stacks) == {"tinyllama": 9, "gemma": 10}[name]


def test_one_more_domain_with_sample_packing(tiny_tinyllama_dir: Path, tmp_path: Path) -> None:
    """brainstacks_stack_onto.yml by the commands as a user types them, onto a library of brainstacks_tinyllama.yml.

    `preprocess` trains nothing, an option beats the file, and folders may have spaces in their names.
    """
    folder = tmp_path / "my experiments"
    folder.mkdir()
    first = example("tinyllama")
    first["brainstacks"]["domains"] = first["brainstacks"]["domains"][:1]
    del first["brainstacks"]["domains"][0]["brainstacks"]  # which asks for more rounds than one
    localised(first, tiny_tinyllama_dir, folder)
    assert first["sample_packing"] is True
    train(first | PACKED, folder)
    before = Library.open(folder / "library").manifest
    assert [stack.name for stack in before.stacks] == ["s001_chat"]

    config = example("stack_onto")
    localised(config, tiny_tinyllama_dir, folder)
    assert config["sample_packing"] is True
    config |= PACKED | {"learning_rate": 0.001}  # on top of a stack, more is a spike
    path = folder / "my config.yml"
    path.write_text(yaml.safe_dump(config))
    prepared = len(list((folder / "prepared").iterdir()))
    plan = run_axolotl(["preprocess", path], tmp_path)
    assert "Plan: " in plan and "Brainstacks: disk: " in plan
    assert Library.open(folder / "library").manifest == before and len(list((folder / "prepared").iterdir())) > prepared
    run_axolotl(["train", path, "--max-steps", "3"], tmp_path)
    library = Library.open(folder / "library")
    assert library.verify() == []
    assert [domain.name for domain in library.manifest.domains] == ["chat", "summaries"]
    chat = library.manifest.domains[0]
    assert chat.protection is not None and chat.model_copy(update={"protection": None}) == before.domains[0]
    # A random model may learn nothing from few rows; then the round is recorded and its stack is not kept.
    (summaries,) = library.manifest.domains[1:]
    assert summaries.done and [record.steps for record in summaries.rounds] == [3]
    names = ["s001_chat", *(record.stack for record in summaries.rounds if record.kept)]
    assert [stack.name for stack in library.manifest.stacks] == names
    assert library.manifest.stacks[0] == before.stacks[0]

    base = AutoModelForCausalLM.from_pretrained(tiny_tinyllama_dir, dtype=torch.float32)
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
    config = with_engine(config, engine, tmp_path) | {"dataset_num_proc": 1, "sample_packing_sequentially": True}
    alone = copy.deepcopy(config)
    del alone["brainstacks"]["domains"][1]
    log = train_ranks(alone, tmp_path, expect=1)
    assert "The examples of `datasets` of domain `chat` do not fill one batch on each of 2 processes" in log
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
    train(config | UNPACKED | {"max_steps": 6, "eval_steps": 3}, tmp_path)
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
