"""Trains one curriculum under every engine, on CPUs in fp32, and says how far the libraries are apart.

    python benchmarks/engines.py [--settings plain balance ...]

Every run sees the same rows in the same order in the same global batches. With the load-balance loss on, two processes
differ from one by more than rounding: it is not linear in the tokens of a micro-batch. With Adam's usual epsilon, weights
whose gradient is nothing but rounding move as far as all others.
"""

import argparse
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from support.agreement import ENGINES, comparable_config, compare, losses, shapes_hash, with_engine  # noqa: E402
from support.models import tiny_llama  # noqa: E402
from support.processes import train, train_ranks  # noqa: E402

from axolotl_brainstacks.library import Library  # noqa: E402

# What differs from `plain`: keys of the config, and of its `brainstacks:` block.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation 2": ({"gradient_accumulation_steps": 2}, {}),
    "clipping": ({"max_grad_norm": 0.3}, {}),
    "sample packing": (
        {
            "sample_packing": True,
            "sample_packing_sequentially": True,
            "multipack_real_batches": True,
            "attn_implementation": "sdpa",
            "sequence_len": 96,
        },
        {},
    ),
    "balance": ({}, {"balance_coef": 0.01}),
    "Adam's usual epsilon": ({"adam_epsilon": 1e-8}, {}),
}


def curriculum(model: Path, folder: Path, setting: str) -> dict[str, Any]:
    top, block = SETTINGS[setting]
    config = comparable_config(model, folder)
    config["brainstacks"] |= block
    return config | {"max_grad_norm": 0.0} | top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    table = Table("setting", "engine", "final val loss of each round", "keys and shapes", "loss, rel.", "weights, abs.")
    with TemporaryDirectory() as temporary:
        model = tiny_llama(Path(temporary) / "model", seed=Random().randrange(10**6))
        for setting in parser.parse_args().settings:
            folder = Path(temporary) / setting.replace(" ", "-")
            folder.mkdir()
            config = curriculum(model, folder, setting) | {"micro_batch_size": 2}
            train(config, folder)
            alone = Library.open(folder / "out" / "library")
            rows = ["  ".join(f"{loss:.6f}" for loss in losses(alone)), shapes_hash(alone)[:12]]
            table.add_row(setting, "one process", *rows, "", "")
            for engine in ENGINES:
                output = folder / engine
                two = config | {"micro_batch_size": 1, "output_dir": str(output / "out")}
                train_ranks(with_engine(two, engine, output), output)
                library = Library.open(output / "out" / "library")
                rows = ["  ".join(f"{loss:.6f}" for loss in losses(library)), shapes_hash(library)[:12]]
                found = compare(library, alone)
                table.add_row(setting, engine, *rows, f"{found.loss_difference:.1e}", f"{found.weight_difference:.1e}")
            Console(width=140).print(table)


if __name__ == "__main__":
    main()
