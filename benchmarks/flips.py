"""Flips bits in every file of a small but full library, one at a time, and says who notices: `benchmarks/attack.py --flips`."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from support.curricula import curriculum_config, write_domain
from support.models import base_config, chat_dataset, tiny_llama
from support.processes import Command, start_train
from transformers import AutoModelForCausalLM

from axolotl_brainstacks.library import Library

KINDS = {
    "manifest": r"manifest\.json",
    "root config": r"adapter_config\.json",
    "root weights": r"adapter_model\.safetensors",
    "stack config": r"stacks/.*\.json",
    "stack weights": r"stacks/.*\.safetensors",
    "columns that protect a domain": r"nullspace/.*",
    "validation rows": r"validation/.*",
    "router config": r"router/router_config\.json",
    "router weights": r"router/router\.safetensors",
    "router's prompts": r"router/prompts/.*",
    "discovery losses": r"router/discovery/.*",
    "router's evaluation": r"router/evaluation\.json",
    "report data": r"report/.*\.jsonl?",
    "report page": r"report/.*\.html",
    "charts": r"report/.*\.png",
}
WAYS = ("open", "load and answer", "verify", "next training", "next router")


class Flipped:
    """A finished library of two domains with a router, the commands that go on with it, and copies with a flipped bit."""

    def __init__(self, folder: Path) -> None:
        self.folder, model = folder, tiny_llama(folder / "model")
        short = {"max_steps": 4, "eval_steps": 2, "save_steps": 1000}
        config = curriculum_config(
            model, folder, ["chat", "code"], boosting={"max_rounds": 1, "min_loss_delta": 0.0},
            router={"width": 16, "epochs": 1, "mixed_pairs": 6},
        )  # fmt: skip
        made = config | short
        # With other settings, or a router that is whole would be left as it is and nothing read.
        other = config["brainstacks"] | {"router": config["brainstacks"]["router"] | {"epochs": 2}}
        self.router_config = made | {"brainstacks": other}
        rows = chat_dataset(write_domain(folder / "math.jsonl", "math", 20, Random(1)))
        self.train_config = base_config(
            model, folder / "next", adapter="brainstacks", datasets=[rows], val_set_size=0.3, learning_rate=1e-2, **short,
            brainstacks=config["brainstacks"] | {"domain": "math", "domains": None},
        )  # fmt: skip
        del self.train_config["brainstacks"]["domains"], self.train_config["save_strategy"]
        self.whole = folder / "out" / "library"
        for command in ("train", "router"):
            assert self._run(command, made, self.whole)[0] == 0
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.pin = Library.open(self.whole).sha256
        for way in WAYS:  # a whole one is noticed by nobody
            assert not self.noticed(way, "manifest.json", 0, 0), way

    def files(self) -> list[str]:
        """All but the empty lock."""
        found = (path for path in self.whole.rglob("*") if path.is_file() and path.stat().st_size)
        return sorted(path.relative_to(self.whole).as_posix() for path in found)

    def noticed(self, way: str, file: str, place: int, flip: int) -> bool:
        """Whether anyone minds a bit that is flipped at a byte: by an error, by a warning that names the file, or by writing the
        file anew."""
        path = self.folder / "copy"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.whole, path)
        data = bytearray((path / file).read_bytes())
        data[place] ^= flip
        (path / file).write_bytes(data)
        if way in ("next training", "next router"):
            command: Command = "train" if way == "next training" else "router"
            config = self.train_config if command == "train" else self.router_config
            status, log = self._run(command, config, path)
            minds = re.compile(rf"{re.escape(file)}.*(altered|truncated|damaged|cannot|left out)")
            return bool(status) or bool(minds.search(log)) or (bool(flip) and not self._still_flipped(file))
        ways: dict[str, Callable[[Path], Any]] = {"open": Library.open, "load and answer": self._answer}
        if way == "verify":
            ways[way] = self._verified
        elif way == "pin":
            ways[way] = lambda path: Library.open(path, self.pin)
        try:
            ways[way](path)
        except (ValueError, OSError, KeyError, TypeError):
            return True
        return False

    def _still_flipped(self, file: str) -> bool:
        """Whether a command has left the file damaged. What is in the manifest follows from its own bytes."""
        path = self.folder / "copy"
        return file == "manifest.json" or any(file in problem for problem in Library.open(path).verify())

    def _answer(self, path: Path) -> None:
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), str(path)).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        model.generate(ids, max_new_tokens=1, do_sample=False)
        model(ids)

    @staticmethod
    def _verified(path: Path) -> None:
        if problems := Library.open(path).verify():
            raise ValueError(problems[0])

    def _run(self, command: Command, config: dict[str, Any], library: Path) -> tuple[int, str]:
        """Exit status and log of a command on a library."""
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.folder / "next", ignore_errors=True)
        process = start_train(
            config | {"brainstacks": config["brainstacks"] | {"library": str(library)}}, folder, command
        )
        process.join(600)
        assert process.exitcode is not None, "hangs"
        return process.exitcode, (folder / "train.log").read_text()


def flips(count: int, seed: int) -> None:
    """Print the table: by kind of file, how many of the flips each way notices. Commands run for one flip a file."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rng, seen, tried = Random(seed), defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    with TemporaryDirectory() as folder:
        library = Flipped(Path(folder))
        for file in library.files():
            kind = next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, file))
            size = (library.whole / file).stat().st_size
            for number in range(count * (5 if kind == "manifest" else 1)):
                place, flip = rng.randrange(size), 1 << rng.randrange(8)
                ways = [way for way in WAYS if not (way.startswith("next") and number)]
                found = [way for way in ways if library.noticed(way, file, place, flip)]
                tried[kind].update([*ways, "all"])
                seen[kind].update(found)
                pinned = found or library.noticed("pin", file, place, flip)
                seen[kind].update([] if found else ["pin alone" if pinned else "nothing"])
    columns = (*WAYS, "pin alone", "nothing")
    print(f"| file | flips | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for kind in tried:
        cells = [f"{seen[kind][way]} of {tried[kind].get(way, tried[kind]['all'])}" for way in columns]
        print(f"| {kind} | {tried[kind]['all']} | {' | '.join(cells)} |")
