"""Mistakes of users: each ends in one clear error that names the key or file and the fix, and the library stays as it was.

Most go through Axolotl's config loading in this process, as in `axolotl train`; a few through the real command.
"""

import copy
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log
from support.models import base_config, chat_dataset, run_axolotl, tiny_llama, write_rows
from support.processes import finish, start_train, train, wait_for
from support.seeds import seeded_random

from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.library import Library

# What `lora_target_linear` wrapped when the library was made.
FROZEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a run that trained the domain `chat`; its library is never changed afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    config = base_config(
        tiny_llama_dir, folder / "out", adapter="brainstacks", max_steps=2, val_set_size=4, learning_rate=0.01,
        dataset_num_proc=0, brainstacks={
            "library": str(folder / "library"), "boosting": {"max_rounds": 1}, "null_space": {"directions": 4, "samples": 4},
            "samples": {"prompts": 0}, "eval_rows": 4, "domains": [domain("chat", folder)],
        },
    )  # fmt: skip
    train(config, folder)
    assert [stack.name for stack in Library.open(folder / "library").manifest.stacks] == ["s001_chat"]
    return config


def domain(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "datasets": [chat_dataset(write_rows(folder / f"{name}.jsonl", 12, Random(name)))]}


@pytest.fixture
def config(trained: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A correct config that adds the domains `code` and `math` to a copy of the trained library."""
    fresh = copy.deepcopy(trained)
    library = shutil.copytree(trained["brainstacks"]["library"], tmp_path / "library")
    fresh |= {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared")}
    fresh["brainstacks"] |= {"library": str(library)}
    fresh["brainstacks"]["domains"] += [domain("code", tmp_path), domain("math", tmp_path)]
    return fresh


def contents(config: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file of the library; the lock's own files are not part of it."""
    folder = Path(config["brainstacks"]["library"])
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(config: dict[str, Any], **cli: Any) -> None:
    """What `axolotl train` does until the model is loaded."""
    try:
        cfg = load_cfg(DictDefault(config), **cli)
        PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    finally:
        close_debug_log()


def assert_refused(config: dict[str, Any], message: str, **cli: Any) -> None:
    before = contents(config)
    with pytest.raises(ValueError, match=message) as caught:
        start(config, **cli)
    assert len(str(caught.value)) < 500 and "input_value" not in str(caught.value)
    assert contents(config) == before


def block(**keys: Any) -> Change:
    return lambda config: config["brainstacks"].update(keys)


def top(**keys: Any) -> Change:
    return lambda config: config.update(keys)


def second_domain(**keys: Any) -> Change:
    return lambda config: config["brainstacks"]["domains"][1].update(keys)


def last_domain(**keys: Any) -> Change:
    return lambda config: config["brainstacks"]["domains"][2].update(keys)


def one_domain(name: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["datasets"] = config["brainstacks"].pop("domains")[1]["datasets"]
        config["brainstacks"]["domain"] = name

    return change


def without_data(config: dict[str, Any]) -> None:
    del config["brainstacks"]["domains"][2]["datasets"]


# A change, and what the error has to mention: the key, the value, and the remedy if there is one.
@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (block(top_kk=2), ("`brainstacks.top_kk`", "`top_k`")),
        (block(null_space={"direction": 2}), ("`brainstacks.null_space.direction`", "`directions`")),
        (block(num_experts="many"), ("`brainstacks.num_experts`", "'many'", "integer")),
        (block(boosting=[1]), ("`brainstacks.boosting`", "list [1]", "keys below it", "`max_rounds:`")),
        (block(router={"floors": [0.2]}), ("`brainstacks.router.floors`", "list [0.2]", "keys below it")),
        (block(domains=["chat"]), ("`brainstacks.domains.0`", "'chat'", "keys below it", "`name:`")),
        (last_domain(brainstacks=3), ("`brainstacks.domains.math.brainstacks`", "3", "keys below it", "`boosting:`")),
        *(
            (top(brainstacks=value), ("`brainstacks`", shown, "keys below it", "`domains:`"))
            for value, shown in (([1, 2], "list [1, 2]"), ("./library", "'./library'"), (True, "True"), (list(range(999)), "..."))
        ),
        (block(top_k=5, num_experts=4), ("brainstacks.top_k is 5", "brainstacks.num_experts is 4")),
        (second_domain(name="chat"), ("brainstacks.domains", "`chat`", "twice")),
        *(
            (second_domain(name=name), ("brainstacks.domains", f"`{name}`", "lower-case"))
            for name in ("Chat", "1st", "my domain", "caf\u00e9", "chat\n", "", "a" * 33, "../up")
        ),
        (second_domain(name=None), ("`brainstacks.domains.1.name`", "None", "string")),
        (one_domain("no-id"), ("brainstacks.domain", "`no-id`")),
        (block(domain="legal"), ("brainstacks", "`domains:`", "`domain:`", "not both")),
        (block(domains=[]), ("brainstacks", "`domains:`", "`domain:`")),
        (without_data, ("`datasets:`", "missing", "`math`")),
        (block(domains=[], domain="legal"), ("brainstacks", "`domains:`", "`domain:`", "not both")),
        (block(library=""), ("`brainstacks.library`", "''", "name a folder")),
        (block(frozen_dtype="bfloat16"), ("frozen_dtype", "bfloat16", "library")),
        (block(frozen_dtype="float8"), ("`brainstacks.frozen_dtype`", "'float8'")),
        (block(router={"floors": {"chta": 0.2}}), ("router.floors", "`chta`", "chat, code, math")),
        (block(router={"soft_domains": ["maths"]}), ("router.soft_domains", "`maths`", "chat, code, math")),
        (lambda config: config.pop("base_model"), ("`base_model`", "missing", "folder")),
        (lambda config: config.pop("learning_rate"), ("`learning_rate`", "missing", "greater than 0")),
        *(
            (top(**{key: value}), (f"`{key}`", repr(value), *remedy))
            for key, value, *remedy in (
                ("base_model", "", "folder"),
                ("lora_r", 0, "whole number", "at least 1"),
                ("lora_r", "16x", "whole number", "at least 1"),
                ("lora_r", True, "whole number", "at least 1"),
                ("lora_alpha", 0, "greater than 0"),
                ("lora_alpha", -16, "greater than 0"),
                ("lora_dropout", 1.0, "[0, 1)"),
                ("lora_dropout", -0.1, "[0, 1)"),
                ("max_steps", 0, "whole number", "at least 1", "leave it out"),
                ("learning_rate", "", "greater than 0"),
                ("learning_rate", 0, "greater than 0"),
                ("optimizer", "adam_torch", "`adamw_torch`"),
                ("micro_batch_size", 0, "whole number", "at least 1"),
                ("gradient_accumulation_steps", 0, "whole number", "at least 1"),
                ("val_set_size", 1.0, "share below 1", "examples"),
            )
        ),
        *(
            (last_domain(**{key: value}), (f"`{key}`", "`math`", repr(value)))
            for key, value in (
                ("max_steps", -1), ("max_steps", 2.5), ("learning_rate", -1e-4), ("optimizer", "adamw_of_mine"),
                ("micro_batch_size", "two"), ("val_set_size", -1), ("datasets", "rows.jsonl"),
                ("datasets", ["rows.jsonl"]), ("datasets", {"path": "rows.jsonl"}),
                ("datasets", [{"type": "alpaca"}]), ("test_datasets", [{"path": None}]),
            )
        ),
        *(
            (last_domain(**{key: value}), (f"`{key}`", "`math`", "cannot be used", "`adapter: brainstacks`"))
            for key, value in (
                ("merge_lora", True), ("resume_from_checkpoint", "there"), ("fsdp_config", {"version": 2}),
                ("lora_modules_to_save", ["lm_head"]),
            )
        ),
        *(
            (last_domain(**{key: value}), (f"`{key}`", "`math`", "same for all domains", "top"))
            for key, value in (
                ("lora_r", 8), ("lora_target_modules", ["q_proj"]), ("lora_fan_in_fan_out", True),
                ("peft_use_rslora", False), ("peft_layers_to_transform", [0]), ("bnb_config_kwargs", {"a": 1}),
                ("overrides_of_model_config", {"a": 1}), ("trust_remote_code", True), ("context_parallel_size", 2),
                ("tensor_parallel_size", 2), ("deepspeed", "zero2.json"), ("fsdp_version", 2), ("tokenizer_type", "A"),
            )
        ),
        *(
            (top(**{key: value}), (f"`{key}`", "cannot be used", "`adapter: brainstacks`"))
            for key, value in (
                ("lora_rank_pattern", {"q_proj": 8}), ("peft_init_lora_weights", "gaussian"), ("loraplus_lr_ratio", 16),
                ("save_only_model", True),
            )
        ),
        (last_domain(rl="dpo"), ("`rl`", "`math`", "'dpo'", "`rl_rounds:`")),
        (top(rl="dpo"), ("`rl`", "cannot be used", "`rl_rounds:`")),
        (
            last_domain(brainstacks={"boosting": {"max_round": 3}}),
            ("`brainstacks.domains.math.brainstacks.boosting.max_round`", "`max_rounds`"),
        ),
        (last_domain(brainstacks={"num_experts": 2}), ("`brainstacks.domains.math.brainstacks.num_experts`", "not a key")),
        (
            last_domain(brainstacks={"null_space": {"samples": 0}}),
            ("`brainstacks.domains.math.brainstacks.null_space.samples`", "0"),
        ),
        (top(adapter="lora"), ("`brainstacks:`", "lora", "`adapter: brainstacks`")),
        (top(brainstacks=None), ("`adapter: brainstacks`", "`brainstacks:`")),
        (second_domain(learing_rate=0.1), ("`learing_rate`", "`code`", "`learning_rate`")),
        (second_domain(load_in_4bit=True), ("`load_in_4bit`", "`code`", "top level")),
        (second_domain(sequence_len="long"), ("`code`", "`sequence_len`", "'long'")),
        (second_domain(learning_rate="fast"), ("`learning_rate`", "`code`", "'fast'", "number")),
    ],
)  # fmt: skip
def test_a_mistake_in_the_config(config: dict[str, Any], change: Change, mentions: tuple[str, ...]) -> None:
    complete = copy.deepcopy(config)
    change(config)
    before = contents(complete)
    with pytest.raises(ValueError) as caught:
        start(config)
    message = str(caught.value)
    assert [part for part in mentions if part not in message] == [], message
    assert len(message) < 300 and "input_value" not in message
    assert contents(complete) == before


def test_the_unchanged_config_is_accepted(config: dict[str, Any]) -> None:
    """Otherwise every other test here could pass for a wrong reason."""
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    start(config)


def test_merging_is_refused(config: dict[str, Any]) -> None:
    assert_refused(config, r"`merge_lora` .*PeftModel\.from_pretrained", merge_lora=True)


def test_a_domain_without_rows(config: dict[str, Any]) -> None:
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    path = Path(config["brainstacks"]["domains"][1]["datasets"][0]["path"])
    message = rf"`code` .*{re.escape(str(path))}.*check"
    for text in ("", "\n", '{"messages": ['):
        path.write_text(text)
        assert_refused(config, message)
    path.unlink()
    assert_refused(config, rf"`datasets` of domain `code`: there is no {re.escape(str(path))}: correct the path")


def test_a_damaged_stack(config: dict[str, Any]) -> None:
    path = Path(config["brainstacks"]["library"]) / "stacks/s001_chat/adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(config, rf"{re.escape(str(path))} is truncated .*restore .*remove")
    at = seeded_random().randrange(len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert_refused(config, rf"{re.escape(str(path))} is altered")
    path.unlink()
    assert_refused(config, rf"{re.escape(str(path))} is missing")


def test_a_library_without_its_manifest(config: dict[str, Any]) -> None:
    path = Path(config["brainstacks"]["library"]) / "manifest.json"
    path.unlink()
    assert_refused(config, rf"{re.escape(str(path))} is missing .*restore .*another folder")


def test_a_library_where_none_can_be(config: dict[str, Any], tmp_path: Path) -> None:
    for file in (tmp_path / "file", tmp_path / "foreign/file"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    for path, message in (
        (tmp_path / "file", ".*File exists.*another folder in brainstacks.library"),
        (tmp_path / "file/library", ".*Not a directory"),
        (Path("/proc/library"), "cannot be made or written"),
        (tmp_path / "foreign", ".*not empty.*new folder in brainstacks.library"),
    ):
        config["brainstacks"]["library"] = str(path)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {message}"):
            start(config)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", ["", "runs/1", "../library"])
def test_outputs_inside_the_library(config: dict[str, Any], inside: str) -> None:
    config["output_dir"] = str(Path(config["brainstacks"]["library"]) / inside)
    assert_refused(config, r"`output_dir` is .*library .*name a folder outside")


def test_projections_that_the_model_lacks(config: dict[str, Any]) -> None:
    """As soon as there is a model; the names that fit do not hide the one that does not."""
    del config["lora_target_linear"]
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    before = contents(config)
    for targets, message in (
        (
            ["q_proj", "k_prj"],
            "`lora_target_modules` .*'k_prj'",
        ),
        (["c_attn"], "c_attn.* not found in the base model"),
        ("q_prj", "q_prj.* not found in the base model"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(config | {"lora_target_modules": targets})
    assert contents(config) == before
    wrapped = {
        layer.module_name.rpartition(".")[2] for layer in loaded(config | {"lora_target_modules": ".*(q|k)_proj"})
    }
    assert wrapped == {"q_proj", "k_proj"} | FROZEN


def loaded(config: dict[str, Any]) -> list[BrainstacksLinear]:
    cfg = load_cfg(DictDefault(config))
    close_debug_log()
    model, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()
    return list(model.base_model.brainstacks_layers())


def test_files_of_the_user_among_the_stacks(config: dict[str, Any]) -> None:
    library = Path(config["brainstacks"]["library"])
    for folder in ("", "stacks", "stacks/s001_chat"):
        (library / folder / "README.md").write_text("mine")
    (library / "adapter_config.json").unlink()  # which every training writes anew
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    before = contents(config)
    start(config)
    assert contents(config) == before


def test_a_domain_that_is_there_already(config: dict[str, Any]) -> None:
    one_domain("chat")(config)
    assert_refused(config, r"brainstacks\.domain: `chat` .*another name, or remove")


def test_a_library_that_another_process_writes(config: dict[str, Any]) -> None:
    path = config["brainstacks"]["library"]
    hold = (
        "import sys; from axolotl_brainstacks.library import Library\n"
        "with Library.open(sys.argv[1]).writing(): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, path], **pipes, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert_refused(config, rf"{re.escape(path)} is being written by another process \(pid {holder.pid} on .*wait")
        holder.stdin.close()
    start(config | {"brainstacks": config["brainstacks"] | {"domains": config["brainstacks"]["domains"][:2]}})


def test_a_library_that_another_process_changed(config: dict[str, Any], tmp_path: Path) -> None:
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    library = Path(config["brainstacks"]["library"])
    process = start_train(config, tmp_path / "run")
    wait_for([process], tmp_path / "run", "Loading the data of domain")
    with Library.open(library).writing() as opened:
        opened.update_domain("chat", soft=True)
    before = contents(config)
    log = finish([process], tmp_path / "run", expect=1)
    assert_failed(log, rf"{re.escape(str(library))} .*changed .*run the same")
    assert contents(config) == before


# Through the command


def assert_failed(log: str, message: str) -> None:
    """The error is the last line that is not of a launcher's traceback; without `--debug` it has no traceback either."""
    tail = "\n".join(log.splitlines()[-40:])
    assert re.search(rf"^(ValueError|Error): .*{message}", tail, re.MULTILINE), tail


def test_commands_fail_with_the_error_at_their_end(config: dict[str, Any], tmp_path: Path) -> None:
    """Three real commands, side by side: the start of each takes most of its time."""
    unknown, truncated, merged = (copy.deepcopy(config) for _ in range(3))
    unknown["brainstacks"]["num_expert"] = 4
    truncated["brainstacks"]["library"] = str(shutil.copytree(config["brainstacks"]["library"], tmp_path / "truncated"))
    stack = tmp_path / "truncated/stacks/s001_chat/adapter_model.safetensors"
    stack.write_bytes(stack.read_bytes()[:-1])
    one_domain("chat")(merged)  # which the library has, as after training
    cases = [
        ("train", unknown, r"`brainstacks\.num_expert` .*`num_experts`"),
        ("train", truncated, rf"{re.escape(str(stack))} is truncated"),
        ("merge-lora", merged, "`merge_lora` .*`adapter: brainstacks`"),
    ]
    before = [contents(case) for _, case, _ in cases]

    def run(number: int) -> str:
        command, case, _ = cases[number]
        path = tmp_path / f"{number}.yml"
        path.write_text(yaml.safe_dump(case | {"output_dir": str(tmp_path / f"out{number}")}))
        launcher = ["--launcher", "python"] if command == "train" else []
        return run_axolotl([command, path, *launcher], tmp_path, expect=None)

    with ThreadPoolExecutor() as pool:
        logs = list(pool.map(run, range(len(cases))))
    for log, (_, _, message) in zip(logs, cases, strict=True):
        assert_failed(log, message)
        assert "Traceback" not in log
    assert [contents(case) for _, case, _ in cases] == before


def test_a_library_of_another_model(config: dict[str, Any], tmp_path: Path) -> None:
    base = Path(config["base_model"])
    before = contents(config)
    for number, (change, message) in enumerate(
        [({"hidden": 128}, "another architecture"), ({"seed": 1}, "other weights")]
    ):
        other = tiny_llama(tmp_path / f"other{number}", **change)
        config |= {"base_model": str(other)}
        config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
        log = train(config, tmp_path / f"run{number}", expect=1)
        assert_failed(log, rf"was trained on {re.escape(str(base))}, but {re.escape(str(other))} has .*{message}")
        assert f"set base_model to {base}" in log
    assert contents(config) == before


def test_a_disk_that_fills_up_while_saving(config: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    library = shutil.copytree(config["brainstacks"]["library"], small_disk / "library")
    config["brainstacks"]["library"] = str(library)
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    before = contents(config)
    stack = (library / "stacks/s001_chat/adapter_model.safetensors").stat().st_size
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - stack))
    log = train(config, tmp_path / "run", expect=1)
    assert re.search(
        rf"OSError: .*disk full, \d+ bytes are needed: free some space.*{re.escape(str(library))}", log[-3000:]
    )
    opened = Library.open(library)
    assert opened.verify() == [] and [s.name for s in opened.manifest.stacks] == ["s001_chat"]
    assert {
        file: digest for file, digest in contents(config).items() if file in before and file != "manifest.json"
    } == {file: digest for file, digest in before.items() if file != "manifest.json"}
    ballast.unlink()
    train(config, tmp_path / "run")
    assert [s.name for s in Library.open(library).manifest.stacks] == ["s001_chat", "s002_code"]


def test_a_disk_that_fills_up_at_a_checkpoint(config: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    library = Path(config["brainstacks"]["library"])
    config["brainstacks"]["domains"] = config["brainstacks"]["domains"][:2]
    config |= {"output_dir": str(small_disk / "out"), "save_steps": 1, "save_strategy": "steps"}
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 1_000_000))
    log = train(config, tmp_path / "run", expect=1)
    assert re.search(r"OSError: .*disk full: free some space and run the same command again", log[-3000:])
    opened = Library.open(library)
    assert opened.verify() == [] and [s.name for s in opened.manifest.stacks] == ["s001_chat"]
    ballast.unlink()
    train(config | {"output_dir": str(tmp_path / "out")}, tmp_path / "run")
    assert [s.name for s in Library.open(library).manifest.stacks] == ["s001_chat", "s002_code"]
