"""Kills a training run (SIGKILL) at random moments, saves included, and starts it again until it has finished.

    python benchmarks/kills.py --kills 50 [--engine single|ddp|zero1|zero2|zero3] [--rl]

With --rl the first domain has rounds of DPO and GRPO, and every kill falls into one of them. After every kill the library
has to verify; a finished one has to equal, bit for bit, that of a run nobody disturbed.
"""

import argparse
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")

from agreement import ENGINES, with_engine  # noqa: E402
from models import tiny_llama  # noqa: E402
from preferences import pairs  # noqa: E402
from processes import finish, start_ranks, start_train  # noqa: E402
from test_curriculum import curriculum_config  # noqa: E402
from test_grpo import rewarded  # noqa: E402
from test_interruption import contents  # noqa: E402

from axolotl_brainstacks.library import Library  # noqa: E402


def start(config: dict[str, Any], engine: str, folder: Path) -> list[Any]:
    return [start_train(config, folder)] if engine == "single" else start_ranks(config, folder)


def rl_starts(folder: Path) -> int:
    """How often a round after the first domain's supervised one has started so far."""
    log = folder / "train.log"
    return len(re.findall(r"chat, round [23] starts", log.read_text())) if log.exists() else 0


def wait_for_rl(processes: list[Any], folder: Path, before: int) -> None:
    while rl_starts(folder) <= before and all(process.is_alive() for process in processes):
        time.sleep(0.05)


def rl_config(model: Path, folder: Path) -> dict[str, Any]:
    """A supervised round, DPO, GRPO, and another domain after them."""
    config = rewarded(model, folder)
    (chat,) = config["brainstacks"]["domains"]
    dpo = {"rl": "dpo", "max_steps": 12, "learning_rate": 3e-3, **pairs(folder)}
    domains = curriculum_config(model, folder, ["chat", "code"])["brainstacks"]["domains"]
    chat = chat | {"rl_rounds": [dpo, *chat["rl_rounds"]]}
    return config | {"brainstacks": config["brainstacks"] | {"domains": [chat, domains[1]]}}


def moment(folder: Path, library: Path) -> str:
    """Where the run was when it was killed, from what it left."""
    if not Library.exists(library):
        return "before the library"
    if (library / ".tmp").exists():
        return "while the library was written"
    checkpoints = sorted((folder / "out").glob("stages/*/checkpoint-*"))
    if any(not (checkpoint / "brainstacks_guard.json").exists() for checkpoint in checkpoints):
        return "in a round, with its last or an unfinished checkpoint"
    return "in a round with a checkpoint" if checkpoints else "without a checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--engine", choices=["single", *ENGINES], default="single")
    parser.add_argument("--rl", action="store_true", help="kill in rounds of DPO and GRPO alone")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; random without it")
    options = parser.parse_args()
    rng, moments, runs, leftovers = Random(options.seed), Counter[str](), 0, 0
    with TemporaryDirectory() as temporary:
        model = tiny_llama(Path(temporary) / "model")
        quiet = Path(temporary) / "quiet"
        quiet.mkdir()
        config = rl_config(model, quiet) if options.rl else curriculum_config(model, quiet, ["chat", "code"])
        config |= {"micro_batch_size": 2 if options.engine == "single" else 1}
        if options.engine != "single":
            config = with_engine(config, options.engine, quiet)
        for _ in range(2):  # the first one also starts what all runs are forked from, and prepares the data
            shutil.rmtree(quiet / "out", ignore_errors=True)
            begin = time.monotonic()
            finish(start(config, options.engine, quiet), quiet)
        seconds, expected = time.monotonic() - begin, contents(quiet / "out" / "library")
        print(f"undisturbed: {seconds:.0f} s, {len(expected['hashes'])} files of tensors", flush=True)
        while sum(moments.values()) < options.kills:
            runs += 1
            folder = Path(temporary) / f"run{runs}"
            library = folder / "out" / "library"
            own = config | {"output_dir": str(folder / "out")}
            while True:
                before = rl_starts(folder)
                processes = start(own, options.engine, folder)
                if sum(moments.values()) < options.kills:
                    if options.rl:
                        wait_for_rl(processes, folder, before)
                    processes[0].join(rng.uniform(0.0 if options.rl else 0.1, 0.4 if options.rl else 1.0) * seconds)
                killed = any(process.is_alive() for process in processes) and sum(moments.values()) < options.kills
                if not killed:
                    finish(processes, folder)
                    break
                for process in processes:
                    process.kill()
                for process in processes:
                    process.join()
                where = moment(folder, library)
                moments[where] += 1
                if Library.exists(library):
                    leftovers += bool(Library.open(library).verify())
                    with Library.open(library).writing() as opened:
                        assert opened.verify() == [], opened.verify()
                print(f"kill {sum(moments.values())}: {where}", flush=True)
            assert Library.open(library).verify() == []
            assert contents(library) == expected, f"run {runs} made another library"
            print(f"run {runs} finished with the same library", flush=True)
    print(
        f"{sum(moments.values())} kills of {options.engine} in {runs} runs, all finished with the same library, bit for bit"
    )
    for where, count in moments.most_common():
        print(f"  {count:3d} {where}")
    print(f"  {leftovers:3d} times `verify` named a leftover of the killed writer, which the next run removed")


if __name__ == "__main__":
    main()
