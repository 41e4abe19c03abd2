"""Kills training, or the making of a router, (SIGKILL) at random moments, saves included, and starts it again until it has
finished.

    python benchmarks/kills.py --kills 50 [--engine single|ddp|zero1|zero2|zero3] [--rl | --router]

With --rl the first domain has rounds of DPO and GRPO, and every kill falls into one of them. With --router a trained library
is given, half of the time one that has a router of other settings, and kills fall between the first prompt that is measured
and the end. After every kill the library has to verify; a finished one has to equal, bit for bit, that of a run nobody
disturbed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")
# As in the tests: no network, and no process of its own for every small file of data.
os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_TEE_STDOUT": "0",
    "AXOLOTL_DATASET_NUM_PROC": "0",
}

from support.agreement import ENGINES, with_engine  # noqa: E402
from support.curricula import (  # noqa: E402
    contents,
    curriculum_config,
    write_domain,
)
from support.models import chat_dataset, tiny_llama  # noqa: E402
from support.preferences import pairs  # noqa: E402
from support.processes import Command, finish, start_ranks, start_train  # noqa: E402
from support.rl_curricula import rewarded  # noqa: E402

from axolotl_brainstacks.library import Library  # noqa: E402
from axolotl_brainstacks.router_training.pipeline import EVALUATION  # noqa: E402

# Lines of the log between which kills fall; without one, from the start, or until the end.
BEGINS = {"rl": r"chat, round [23] starts", "router": r"discovery: "}
ENDS = {"rl": r"Domain code \(2 of 2\)"}


@dataclass(frozen=True)
class Setting:
    """What is killed: training of supervised rounds ("train"), of RL rounds ("rl"), or the making of a router, by an
    engine. `libraries`: those that a router is made for, in turn; empty for training, which starts without one."""

    kind: str
    engine: str
    config: dict[str, Any]
    libraries: tuple[Path, ...] = ()

    def start(self, folder: Path, run: int = 0) -> list[Any]:
        """Start the command in `folder`, where its library goes; `run` chooses among `libraries`."""
        config = self.config | {"output_dir": str(folder / "out")}
        if self.libraries:
            library = self.library(folder)
            if not library.exists():
                shutil.copytree(self.libraries[run % len(self.libraries)], library)
            config["brainstacks"] = config["brainstacks"] | {"library": str(library)}
        command: Command = "router" if self.kind == "router" else "train"
        if self.engine == "single":
            return [start_train(config, folder, command)]
        return start_ranks(config, folder, command=command)

    @staticmethod
    def library(folder: Path) -> Path:
        return folder / "out" / "library"

    def begun(self, folder: Path) -> int:
        """How often the part in which kills fall has begun so far."""
        return count(BEGINS.get(self.kind), folder)

    def wait_for_begin(self, processes: list[Any], folder: Path, before: int = 0) -> None:
        """Wait until that part begins once more, or the run ends."""
        if line := BEGINS.get(self.kind):
            wait(processes, lambda: count(line, folder) > before)

    def wait_for_end(self, processes: list[Any], folder: Path) -> None:
        line = ENDS.get(self.kind)
        wait(processes, lambda: count(line, folder) > 0)

    def result(self, folder: Path) -> dict[str, Any]:
        return router_contents(self.library(folder)) if self.kind == "router" else contents(self.library(folder))


def count(line: str | None, folder: Path) -> int:
    """How often a line that matches is in the log of `folder`."""
    log = folder / "train.log"
    return len(re.findall(line, log.read_text())) if line and log.exists() else 0


def wait(processes: list[Any], condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true, or a process ends."""
    while all(process.is_alive() for process in processes) and not condition():
        time.sleep(0.02)


def supervised_setting(model: Path, folder: Path, engine: str) -> Setting:
    config = curriculum_config(model, folder, ["chat", "code"])
    return Setting("train", engine, with_processes(config, engine, folder))


def rl_setting(model: Path, folder: Path, engine: str) -> Setting:
    """A supervised round, DPO, GRPO, and another domain after them."""
    config = rewarded(model, folder)
    (chat,) = config["brainstacks"]["domains"]
    dpo = {"rl": "dpo", "max_steps": 12, "learning_rate": 3e-3, **pairs(folder)}
    domains = curriculum_config(model, folder, ["chat", "code"])["brainstacks"]["domains"]
    chat = chat | {"rl_rounds": [dpo, *chat["rl_rounds"]]}
    config |= {"brainstacks": config["brainstacks"] | {"domains": [chat, domains[1]]}}
    return Setting("rl", engine, with_processes(config, engine, folder))


def router_setting(model: Path, folder: Path, engine: str) -> Setting:
    """Two domains with prompts enough for some seconds of discovery and of the fit."""
    rng, names = Random(3), ["chat", "code"]
    config = curriculum_config(model, folder, names, router={"width": 64, "epochs": 12, "mixed_pairs": 24})
    for domain in config["brainstacks"]["domains"]:
        rows = write_domain(folder / f"{domain['name']}-router.jsonl", domain["name"], 96, rng)
        domain["brainstacks"] = {"router_datasets": [chat_dataset(rows)]}
    trained = Setting("train", "single", config)
    finish(trained.start(folder / "trained"), folder / "trained")
    without = trained.library(folder / "trained")
    other = config["brainstacks"]["router"] | {"width": 16, "epochs": 1}
    earlier = config | {"brainstacks": config["brainstacks"] | {"router": other}}
    older = Setting("router", "single", earlier, (without,))
    finish(older.start(folder / "earlier"), folder / "earlier")
    libraries = (without, older.library(folder / "earlier"))
    return Setting("router", engine, with_processes(config, engine, folder), libraries)


def with_processes(config: dict[str, Any], engine: str, folder: Path) -> dict[str, Any]:
    if engine == "single":
        return config
    return with_engine(config | {"micro_batch_size": 1}, engine, folder)


def router_contents(library: Path) -> dict[str, Any]:
    """All files of the router and the report by hash, and what the manifest says of all but the evaluation, which counts the
    forwards of its own run."""
    manifest = json.loads((library / "manifest.json").read_text())
    manifest["records"].pop(EVALUATION)
    evaluation = json.loads((library / EVALUATION).read_text())
    evaluation.pop("forwards")
    files = sorted(path for folder in ("router", "report") for path in (library / folder).rglob("*") if path.is_file())
    hashes = {str(path.relative_to(library)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    hashes.pop(EVALUATION)
    return {"manifest": manifest, "evaluation": evaluation, "hashes": hashes}


def moment(setting: Setting, folder: Path) -> str:
    """Where the run was when it was killed, from what it left."""
    path = setting.library(folder)
    if not Library.exists(path):
        return "before the library"
    if (path / ".tmp").exists():
        return "while the library was written"
    if setting.kind == "router":
        return router_moment(path)
    checkpoints = sorted((folder / "out").glob("stages/*/checkpoint-*"))
    rounds = [record.rl for domain in Library.open(path).manifest.domains for record in domain.rounds]
    where = (
        {0: "round 1", 1: "DPO", 2: "GRPO"}.get(len(rounds), "the next domain") if setting.kind == "rl" else "a round"
    )
    if any(not (checkpoint / "brainstacks_guard.json").exists() for checkpoint in checkpoints):
        return f"in {where}, with its last or an unfinished checkpoint"
    return f"in {where}, with a checkpoint" if checkpoints else f"in {where}, without a checkpoint"


def router_moment(path: Path) -> str:
    manifest = Library.open(path).manifest
    evaluation = json.loads((path / EVALUATION).read_text()) if EVALUATION in manifest.records else {}
    lines = sum(len((path / file).read_bytes().splitlines()) - 1 for file in manifest.records if "discovery/" in file)
    if evaluation.get("settings", {}).get("width") == 64:
        return "with the evaluation and the router" if manifest.router else "between the evaluation and the router"
    if "router/prompts/_mixed.safetensors" in manifest.records and not evaluation:
        return "in the fit or the measuring after it"
    if evaluation:
        return "beside a router of other settings"
    return "in discovery" if lines else "before the first losses"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--engine", choices=["single", *ENGINES], default="single")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; random without it")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--rl", dest="make", action="store_const", const=rl_setting, help="kill in rounds of DPO and GRPO"
    )
    kinds.add_argument(
        "--router", dest="make", action="store_const", const=router_setting, help="kill brainstacks-router"
    )
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        quiet = Path(temporary) / "quiet"
        quiet.mkdir()
        setting = (options.make or supervised_setting)(tiny_llama(Path(temporary) / "model"), quiet, options.engine)
        kill(setting, options.kills, Random(options.seed), Path(temporary))


def kill(setting: Setting, kills: int, rng: Random, temporary: Path) -> None:
    """Run, kill, check and print, `kills` times."""
    expected, seconds = undisturbed(setting, temporary)
    moments, runs, leftovers = Counter[str](), 0, 0
    while moments.total() < kills:
        runs += 1
        folder = temporary / f"run{runs}"
        library = setting.library(folder)
        while True:
            before = setting.begun(folder)
            processes = setting.start(folder, runs)
            if moments.total() < kills:
                setting.wait_for_begin(processes, folder, before)
                processes[0].join(rng.uniform(0.1 if setting.kind == "train" else 0, 1) * seconds)
            if moments.total() == kills or not any(process.is_alive() for process in processes):
                finish(processes, folder)
                break
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            where = moment(setting, folder)
            moments[where] += 1
            print(f"kill {moments.total()}: {where}", flush=True)
            if Library.exists(library):
                leftovers += bool(Library.open(library).verify())
                with Library.open(library).writing() as opened:
                    assert opened.verify() == [], opened.verify()
        assert Library.open(library).verify() == []
        differences = list(differing(expected, setting.result(folder)))
        assert not differences, f"run {runs} made another library: " + "; ".join(differences)
        print(f"run {runs} finished with the same library", flush=True)
        shutil.rmtree(folder)
    show(setting, moments, runs, leftovers)


def differing(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    """Every value that is not as expected, with its place."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            yield from differing(expected.get(key), found.get(key), f"{place}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from differing(*pair, f"{place}/{number}")
    elif expected != found:
        yield f"{place}: {expected} -> {found}"


def undisturbed(setting: Setting, temporary: Path) -> tuple[dict[str, Any], float]:
    """What a run makes that is left alone, and the seconds of the part in which kills are to fall."""
    results, seconds = [], 0.0
    for number in range(2):  # the first one also starts what all runs are forked from, and prepares the data
        folder = temporary / f"undisturbed{number}"
        processes = setting.start(folder, number)
        setting.wait_for_begin(processes, folder)
        begin = time.monotonic()
        setting.wait_for_end(processes, folder)
        seconds = max(seconds, time.monotonic() - begin)
        finish(processes, folder)
        results.append(setting.result(folder))
    differences = list(differing(*results))
    assert not differences, "two undisturbed runs make different libraries: " + "; ".join(differences)
    print(f"undisturbed: {seconds:.1f} s, {len(results[1]['hashes'])} files compared", flush=True)
    return results[1], seconds


def show(setting: Setting, moments: Counter[str], runs: int, leftovers: int) -> None:
    print(
        f"\n{moments.total()} kills of {setting.kind}, {setting.engine}, in {runs} runs, all finished with the same library, bit "
        "for bit; `verify` clean after each\n"
    )
    print("| killed | times |\n| --- | --- |")
    for where, count in moments.most_common():
        print(f"| {where} | {count} |")
    print(f"| (`verify` named a leftover of the killed writer, which the next writer moved aside) | {leftovers} |")


if __name__ == "__main__":
    main()
