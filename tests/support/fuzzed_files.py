"""Attacks on all that commands read of a library, and on an adapter to import; no model is loaded."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from click.testing import CliRunner
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import save

from axolotl_brainstacks import cli
from axolotl_brainstacks.evaluation import pack_rows, unpack_rows
from axolotl_brainstacks.guarded import parse_json
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import DomainEntry, RouterEntry
from axolotl_brainstacks.library.lora_import import read_config, read_pairs, stack_of
from axolotl_brainstacks.library.manifest import BaseModelInfo
from axolotl_brainstacks.library.report import FORGETTING, SAMPLES, write_report
from axolotl_brainstacks.router_training.data import _kept
from axolotl_brainstacks.router_training.discovery import Records
from axolotl_brainstacks.router_training.pipeline import EVALUATION
from axolotl_brainstacks.router_training.report import Shown, show
from support.fuzzing import ODD, Attack, Wrong, damaged, odd_tensors, odd_text, put, sha256_of
from support.random_library import CONFIG, a_round, some_tensors
from support.routed import random_rows


def whole_library(path: Path, rng: Random) -> Library:
    """Two domains, a null space, a router of two small files, discovery losses, kept rows, an evaluation and a report."""
    torch.manual_seed(rng.randrange(2**32))
    library = Library.create(
        path, BaseModelInfo(name="tiny", config_hash="0" * 64, fingerprint=torch.randn(32).tolist())
    )
    with library.writing():
        for name in ("chat", "code"):
            library.add_domain(DomainEntry(name=name, base_loss=2.0, eval_rows=4), pack_rows(random_rows(6, rng)))
            library.add_stack(name, 1, CONFIG, some_tensors(), a_round())
            library.finish_domain(name)
        library.write_protection("chat", {"q": torch.eye(8)[:, :2]}, 0.5, 0.5, [])
        library.write_root_config(CONFIG)
        for file, content in contents_to_read(rng).items():
            library.write_file(file, content)
        names = ("router/router_config.json", "router/router.safetensors")
        files = {name: library.write_file(name, b"{}" if name.endswith("json") else save({})) for name in names}
        library.set_router(RouterEntry(files=files, domains=["chat", "code"]))
        write_report(library)
    return library


EVALUATED = {
    "origin": "0" * 64,
    "score": {"domains": {"top1": 1.0, "set_match": 1.0, "bce": 0.1}},
    "gate": {"weights": "soft", "gate_threshold": 0.1},
    "settings": {"weights": "soft", "gate_threshold": 0.1},
    "calibration": [],
    "prompts": {"chat": {"train": 1, "validation": 1, "test": 1}},
    "losses": {"chat": {"prompts": 1, "uncovered": 0, "base": 2.0, "router": 1.0, "discovered": 1.0, "regret": 0.0}},
    "winners": {"chat": {"chat": 3}},
    "found_by": {"chat": {"grown": 3}},
    "leaves_out_own": {"chat": 0.0},
}
FORGOTTEN = [{"after": "chat", "own_stacks": {"chat": 1.0}, "all_stacks": {"chat": 1.0}}]
SAMPLE = {"domain": "chat", "round": 1, "prompt": "a", "answer": "b", "reference": "c"}
FOUND = [
    {"stacks": {"chat": ["s001_chat"], "code": ["s002_code"]}, "floors": {}},
    {"row": "0" * 16, "best": ["chat"], "found_by": "grown", "base": 2.0, "losses": {"": 2.0, "chat": 1.0}},
]


def contents_to_read(rng: Random) -> dict[str, bytes]:
    return {
        "router/discovery/chat.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in FOUND),
        "router/prompts/chat.safetensors": pack_rows(random_rows(4, rng)),
        EVALUATION: json.dumps(EVALUATED).encode(),
        FORGETTING: json.dumps(FORGOTTEN).encode(),
        SAMPLES: json.dumps(SAMPLE).encode(),
    }


def read_all(library: Library) -> None:
    """Whatever a user can do with a library but for loading it into a model."""
    for stack in library.manifest.stacks:
        library.stack_config(stack.name)
        library.stack_tensors(stack.name)
    for domain in library.manifest.domains:
        if domain.validation:
            unpack_rows(library.validation(domain.name))
        if domain.protection:
            library.protection(domain.name)
    for command in (["list"], ["report"], ["verify"], ["replace", "chat", "--yes"], ["remove", "code", "--yes"]):
        result = CliRunner().invoke(cli.library, [str(library.path), *command])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if "\x1b" in result.output or "\u202e" in result.output:
            raise Wrong(f"{command} writes control characters")


# Attacks: each makes one variant in `folder`, which holds a whole library, and does what a user would do


def manifest(folder: Path, rng: Random) -> None:
    """Accepted is what says word for word what the file says, and never in place of a pinned one."""
    path = folder / "manifest.json"
    pin, whole = sha256_of(path), json.loads(path.read_bytes())
    path.write_bytes(odd_text(whole, rng))
    with suppress(ValueError):
        Library.open(folder, pin)
        if sha256_of(path) != pin:
            raise Wrong("another manifest than the pinned one is read")
    library = Library.open(folder)
    said, read = json.loads(path.read_bytes()), json.loads(library.manifest.model_dump_json())
    if not _within(said | {"schema_version": 2}, read):
        raise Wrong("the manifest is read as something else than it says")
    read_all(library)


def bytes_of_any_file(folder: Path, rng: Random) -> None:
    """Each change is seen by `verify` against a pin."""
    library = Library.open(folder)
    files = sorted({*library.manifest.covered, "manifest.json"})
    path = folder / rng.choice(files)
    before, pin = path.read_bytes(), library.sha256
    path.write_bytes(after := damaged(before, rng))
    with suppress(ValueError):
        if not Library.open(folder, pin).verify() and after != before:
            raise Wrong(f"{path.name} is altered, and nobody notices")
    read_all(Library.open(folder))


def links(folder: Path, rng: Random) -> None:
    """Nothing outside changes, and nothing waits."""
    outside = folder.with_name("outside")
    shutil.copytree(folder, outside)
    before = _contents(outside)
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.name != "manifest.json"]
    names += [Path(name) for name in (".lock", ".lock.owner", ".tmp", ".leftovers", "report/router.png", ".tmp/x.json")]
    name = rng.choice(sorted(names))
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    match rng.randrange(4):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(rng.choice([outside, outside / "stacks", outside / "validation"]))
        case _:
            path.symlink_to(outside / name)
    try:
        read_all(Library.open(folder))
    finally:
        if _contents(outside) != before:
            raise Wrong(f"files outside have changed through {name}")


def stack_files(folder: Path, rng: Random) -> None:
    """A stranger's own stack, with its true hash."""
    library = Library.open(folder)
    if rng.random() < 0.5:
        put(folder, "stacks/s001_chat/adapter_config.json", odd_text(library.stack_config("s001_chat"), rng))
    else:
        tensors = {key: tensor.contiguous() for key, tensor in some_tensors().items()}
        put(folder, "stacks/s001_chat/adapter_model.safetensors", odd_tensors(tensors, rng))
    read_all(Library.open(folder))


def validation(folder: Path, rng: Random) -> None:
    """A stranger's own rows and null space, with their true hashes."""
    rows = random_rows(3, rng)
    flat = {
        "input_ids": torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int32),
        "labels": torch.tensor([label for row in rows for label in row.labels], dtype=torch.int32),
        "lengths": torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int32),
    }
    if rng.random() < 0.7:
        put(folder, "validation/chat.safetensors", odd_tensors(flat, rng))
    else:
        (file,) = (folder / "nullspace").iterdir()
        put(folder, f"nullspace/{file.name}", odd_tensors({"q": torch.eye(8)[:, :2].contiguous()}, rng))
    read_all(Library.open(folder))


def records(folder: Path, rng: Random) -> None:
    """A stranger's own discovery losses, prompts, evaluation and report data, with their true hashes."""
    library = Library.open(folder)
    file = rng.choice(
        ["router/discovery/chat.jsonl", "router/prompts/chat.safetensors", EVALUATION, FORGETTING, SAMPLES]
    )
    if file.endswith("safetensors"):
        data = damaged(contents_to_read(rng)[file], rng)
    elif file.endswith("jsonl") and file != SAMPLES:
        data = b"".join(odd_text(line, rng).replace(b"\n", b" ") + b"\n" for line in FOUND)
    else:
        data = odd_text({EVALUATION: EVALUATED, FORGETTING: FORGOTTEN, SAMPLES: SAMPLE}[file], rng)
    with library.writing():
        library.write_file(file, data)
        known = Records(library, "chat", ["chat", "code"], {})
        for losses, _ in known.read().values():
            if not all(isinstance(loss, float) and set(names) <= {"chat", "code"} for names, loss in losses.items()):
                raise Wrong("losses of unknown sets")
        known.write([])
        write_report(library)
    if file == EVALUATION:
        evaluation = parse_json(data, non_finite=True)  # as `made_before` does
        Shown.model_validate(evaluation)
        show(evaluation, Console(file=open(os.devnull, "w"), markup=False, emoji=False))  # noqa: SIM115, PTH123
    _kept(library, "chat")
    read_all(library)


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], alpha_pattern={"v_proj": 3})


def lora_import(folder: Path, rng: Random) -> None:
    """Accepted is an adapter that becomes a stack of finite numbers."""
    adapter = folder.with_name("adapter")
    adapter.mkdir()
    whole = {key: sorted(item) if isinstance(item, set) else item for key, item in LORA.to_dict().items()}
    whole |= {"base_model_name_or_path": "base", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    prefix = "base_model.model.model.layers.0.self_attn."
    tensors = {
        f"{prefix}{name}.lora_{side}.weight": torch.randn(*shape)
        for name in ("q_proj", "v_proj")
        for side, shape in (("A", (4, 8)), ("B", (6, 4)))
    }
    odd_patterns = [
        "(",
        "a**",
        r"(\w|[a-z]|\.|_)+[^j]",
        "(?:(?:a{1000}){1000}){1000}",
        "q" * 3000,
        "[",
        "(?R)",
        "v_proj",
    ]
    if rng.random() < 0.2:
        whole["alpha_pattern"] = {rng.choice(odd_patterns): rng.choice([1, *ODD])}
    config_is_odd = rng.random() < 0.5
    (adapter / "adapter_config.json").write_bytes(odd_text(whole, rng) if config_is_odd else json.dumps(whole).encode())
    (adapter / "adapter_model.safetensors").write_bytes(save(tensors) if config_is_odd else odd_tensors(tensors, rng))
    config, made = stack_of(read_config(adapter), read_pairs(adapter))
    if config.scaling <= 0 or any(not tensor.isfinite().all() for tensor in made.values()):
        raise Wrong("a stack that is no number")


ATTACKS = {
    name: Attack(whole_library, attempt)
    for name, attempt in {
        "manifest": manifest,
        "bytes of any file": bytes_of_any_file,
        "links, FIFOs, folders for files": links,
        "stack files": stack_files,
        "validation rows, null spaces": validation,
        "discovery, prompts, evaluation, report": records,
        "LoRA import": lora_import,
    }.items()
}


def _within(said: Any, read: Any) -> bool:
    """Whether all that is said was read so; what is left out has got its default."""
    if isinstance(said, dict) and isinstance(read, dict):
        return all(key in read and _within(item, read[key]) for key, item in said.items())
    if isinstance(said, list) and isinstance(read, list):
        return len(said) == len(read) and all(map(_within, said, read))
    # 3 is a float too, and true is no 1.
    return said == read and isinstance(said, bool) == isinstance(read, bool)


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
