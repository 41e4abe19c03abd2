"""The losses of one tiny curriculum stay what they were: a change of training that no other test expects shows here.

After a change that is meant to alter them, look at the differences and renew the file:

    BRAINSTACKS_RENEW_GOLDEN=1 python -m pytest tests/test_golden_losses.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.curricula import curriculum_config
from support.models import tiny_llama
from support.processes import train

from axolotl_brainstacks.library import Library

GOLDEN = Path(__file__).with_name("golden_losses.json")
# Other processors, numbers of threads and releases of PyTorch add in another order; that moves a loss of 6 by far less.
TOLERANCE = 0.01


def losses(library: Library) -> dict[str, list[float]]:
    """Per domain: the base model's validation loss, and each round's at its start and its end, kept or not."""
    return {
        entry.name: [
            entry.base_loss,
            *(loss for record in entry.rounds for loss in (record.loss_before, record.loss_after)),
        ]
        for entry in library.manifest.domains
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("golden")
    base = tiny_llama(folder / "base", corpus=["<|im_start|>user Double abcd WXYZ assistant<|im_end|>"])
    train(curriculum_config(base, folder, ["chat", "code"]), folder)
    library = Library.open(folder / "out" / "library")
    forgetting = json.loads((library.path / "report/forgetting.json").read_text())
    return {"losses": losses(library), "all_stacks": [row["all_stacks"] for row in forgetting]}


def test_losses_are_what_they_were(measured: dict[str, Any]) -> None:
    if os.environ.get("BRAINSTACKS_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(measured, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert measured["losses"].keys() == golden["losses"].keys()
    for domain, values in golden["losses"].items():
        assert measured["losses"][domain] == pytest.approx(values, abs=TOLERANCE), domain
    for now, then in zip(measured["all_stacks"], golden["all_stacks"], strict=True):
        assert now == pytest.approx(then, abs=TOLERANCE)


def test_the_tolerance_is_finer_than_what_a_round_gains() -> None:
    """Otherwise a round that learns nothing would pass for the golden one."""
    for base, *rounds in json.loads(GOLDEN.read_text())["losses"].values():
        assert base - rounds[1] > 10 * TOLERANCE
