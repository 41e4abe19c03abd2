"""`replace` and the training after it, by the real commands on a tiny model."""

from pathlib import Path

from click.testing import CliRunner
from support.curricula import curriculum_config
from support.processes import train
from support.rl_curricula import stack_hashes

from axolotl_brainstacks.cli import library as library_command
from axolotl_brainstacks.library import Library


def test_a_replaced_domain_is_trained_again_in_its_place(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = curriculum_config(
        tiny_llama_dir, tmp_path, ["chat", "code"], boosting={"max_rounds": 1, "min_loss_delta": 0.0}
    )
    train(config, tmp_path)
    path = tmp_path / "out" / "library"
    before = Library.open(path)
    done = CliRunner().invoke(library_command, [str(path), "replace", "chat", "--yes"])
    assert done.exit_code == 0 and "Trained on top of its stacks" in done.output and "code" in done.output
    config["brainstacks"]["domains"][0]["max_steps"] = 4
    train(config, tmp_path)
    after = Library.open(path)
    assert after.verify() == []
    assert [entry.name for entry in after.manifest.domains] == ["chat", "code"]
    assert list(stack_hashes(after)) == ["s002_code", "s003_chat"]
    assert stack_hashes(after)["s002_code"] == stack_hashes(before)["s002_code"]
    chat, code = after.manifest.domains
    assert chat.context == ["s003_chat"] and chat.rounds[0].steps == 4
    assert code.context == ["s003_chat", "s002_code"]
    # Trained against what protects code, as code's data and stacks are there; the first time nothing was.
    assert chat.constraint is not None and chat.constraint.protects == ["code"]
    assert chat.rounds[0].metrics["null_space_leakage"] < 1e-6
    # What code was trained on top of, the old stack of chat, is no reason to keep the new one out of its directions.
    assert chat.constraint.columns <= 8 and code.protection is None
    assert before.manifest.domain("chat").constraint is None
