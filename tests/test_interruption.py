"""Kill training anywhere: the next run finishes, the library is whole, and it is the one an undisturbed run makes."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.agreement import with_engine
from support.curricula import contents, curriculum_config
from support.processes import start_ranks, start_train, train, train_ranks, wait_for
from support.seeds import seeded_random

from axolotl_brainstacks.curriculum.checkpoints import Fingerprint, last_complete_checkpoint
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.library import Library

KILLS = int(os.environ.get("BRAINSTACKS_KILLS", "2"))


@pytest.fixture(scope="module")
def undisturbed(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, float]:
    """A config, the library of its second run, and that run's seconds. The first is beside it, in `first`: its frozen
    stacks were offloaded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = curriculum_config(tiny_llama_dir, folder, ["chat", "code"])
    offloaded = config | {"brainstacks": config["brainstacks"] | {"offload_frozen": True}}
    assert "Frozen stacks stay in CPU memory" in train(offloaded, folder)
    (folder / "out").rename(folder / "first")
    start = time.monotonic()
    train(config, folder)
    return config, folder / "out" / "library", time.monotonic() - start


def processes_of(group: int) -> int:
    """How many processes of a group there are."""
    stats = [text for file in Path("/proc").glob("[0-9]*/stat") if (text := _read(file))]
    fields = [text.rpartition(") ")[2].split() for text in stats]  # state, parent, group, …
    return sum(int(of) == group and state != "Z" for state, _, of, *_ in fields)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # the process has ended
        return ""


def test_two_runs_make_the_same_library_offloaded_or_not(undisturbed: tuple[dict[str, Any], Path, float]) -> None:
    library = undisturbed[1]
    assert contents(library.parents[1] / "first/library") == contents(library)


@pytest.mark.parametrize("attempt", range(KILLS))
def test_killed_runs_finish_with_the_same_library(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path, attempt: int
) -> None:
    config, library, seconds = undisturbed
    config = config | {"output_dir": str(tmp_path / "out")}
    for _ in range(2):
        process = start_train(config, tmp_path)
        process.join(seeded_random().uniform(0.2, 1.0) * seconds)
        process.kill()
        process.join()
        if Library.exists(tmp_path / "out" / "library"):
            Library.open(tmp_path / "out" / "library")
    train(config, tmp_path)
    finished = Library.open(tmp_path / "out" / "library")
    assert finished.verify() == []
    assert contents(finished.path) == contents(library)
    assert not list((tmp_path / "out").glob("stages/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_with_a_checkpoint(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path, number: signal.Signals
) -> None:
    config, library, _ = undisturbed
    config = config | {"output_dir": str(tmp_path / "out"), "save_steps": 1000}
    process = start_train(config, tmp_path)
    log = wait_for([process], tmp_path, "round1/loss")
    for _ in range(2):  # as from a scheduler and a launcher
        os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert len(list((tmp_path / "out").glob("stages/chat-1/checkpoint-*/brainstacks_guard.json"))) == 1
    assert Library.open(tmp_path / "out" / "library").verify() == []
    train(config, tmp_path)
    # An evaluation that the undisturbed run does not make could find other best weights.
    resumed = log.read_text().partition("Resuming chat, round 1")[2]
    assert 0 < resumed.index("round1/loss") < resumed.index("round1/eval_loss")
    assert contents(tmp_path / "out" / "library") == contents(library)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_data_loaders_workers(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path, number: signal.Signals
) -> None:
    """As a cluster's scheduler, `timeout` and Ctrl-C send it."""
    config, library, _ = undisturbed
    config = config | {"output_dir": str(tmp_path / "out"), "save_steps": 1000, "dataloader_num_workers": 2}
    process = start_train(config, tmp_path)
    log = wait_for([process], tmp_path, "round1/loss")
    assert process.pid is not None and process.pid == os.getpgid(process.pid)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number, log.read_text()[-3000:]
    (checkpoint,) = (tmp_path / "out").glob("stages/chat-1/checkpoint-*")
    assert log.read_text().count("stopping after this step") == 1
    last = log.read_text().splitlines()[-1]
    assert "Stopped. The checkpoint of chat, round 1, step" in last
    assert f"step {checkpoint.name.removeprefix('checkpoint-')} is in {checkpoint}; the same command resumes" in last
    assert not processes_of(process.pid)
    train(config, tmp_path)
    assert "Resuming chat, round 1" in log.read_text()
    assert contents(tmp_path / "out" / "library") == contents(library)


def test_an_error_after_a_signal_is_taken_for_its_consequence(caplog: pytest.LogCaptureFixture) -> None:
    """The signal may have ended a process of a pool that tokenises a dataset."""
    interruption = Interruption()
    with pytest.raises(RuntimeError), interruption.watching():
        raise RuntimeError
    with pytest.raises(SystemExit) as left, interruption.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a process has died")
    assert left.value.code == 128 + signal.SIGTERM
    assert "a process has died" in caplog.text and "The same command resumes" in caplog.text


def test_workers_end_with_a_killed_run(undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path) -> None:
    config = undisturbed[0] | {"output_dir": str(tmp_path / "out"), "dataloader_num_workers": 2}
    process = start_train(config, tmp_path)
    wait_for([process], tmp_path, "round1/loss")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # with its workers there, as it loads a batch for every step
    assert processes_of(process.pid) >= 3
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(process.pid)


def test_a_run_stopped_between_two_rounds_says_where_it_continues(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path
) -> None:
    config = undisturbed[0] | {"output_dir": str(tmp_path / "out")}
    process = start_train(config, tmp_path, debug=False)
    log = wait_for([process], tmp_path, "chat, round 1: validation loss")
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    last = log.read_text().splitlines()[-1]
    # The second one if the signal has come later than it should, when the next round was under way.
    assert "Stopped. The same command continues with chat, round 2" in last or "chat, round 2, step 1 is in" in last


def test_a_round_killed_after_its_last_step_trains_no_further(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path
) -> None:
    config, library, _ = undisturbed
    config = config | {"output_dir": str(tmp_path / "out")}
    process = start_train(config, tmp_path)
    wait_for([process], tmp_path, "chat/round1/train_runtime")
    process.kill()
    process.join()
    assert list((tmp_path / "out").glob("stages/chat-1/checkpoint-8"))
    train(config, tmp_path)
    assert contents(tmp_path / "out" / "library") == contents(library)


def test_a_signal_after_the_last_step_keeps_the_round(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path
) -> None:
    config, library, _ = undisturbed
    config = config | {"output_dir": str(tmp_path / "out"), "save_steps": 1000}
    process = start_train(config, tmp_path)
    wait_for([process], tmp_path, "chat/round1/train_runtime")
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert [stack.name for stack in Library.open(tmp_path / "out/library").manifest.stacks] == ["s001_chat"]
    train(config, tmp_path)
    assert contents(tmp_path / "out" / "library") == contents(library)


def test_a_half_done_domain_is_judged_on_the_rows_it_began_with(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path
) -> None:
    config = undisturbed[0] | {"output_dir": str(tmp_path / "out")}
    config["brainstacks"] = config["brainstacks"] | {"domains": config["brainstacks"]["domains"][:1]}
    process = start_train(config, tmp_path)
    wait_for([process], tmp_path, "chat, round 2 starts")
    process.kill()
    process.join()
    began = Library.open(tmp_path / "out" / "library").validation("chat")
    train(config | {"brainstacks": config["brainstacks"] | {"eval_rows": 3}}, tmp_path)
    library = Library.open(tmp_path / "out" / "library")
    assert library.validation("chat") == began
    (chat,) = library.manifest.domains
    (row,) = json.loads((library.path / "report/forgetting.json").read_text())
    assert row["own_stacks"]["chat"] == [record for record in chat.rounds if record.kept][-1].loss_after


@pytest.fixture(scope="module")
def stopped(
    undisturbed: tuple[dict[str, Any], Path, float], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The config of one domain, and the output_dir of a run of it that was stopped in its first round."""
    folder = tmp_path_factory.mktemp("stopped")
    config = undisturbed[0] | {"output_dir": str(folder / "out"), "save_steps": 1000}
    config["brainstacks"] = config["brainstacks"] | {
        "boosting": {"max_rounds": 1}, "samples": {"prompts": 0}, "domains": config["brainstacks"]["domains"][:1],
    }  # fmt: skip
    process = start_train(config, folder)
    wait_for([process], folder, "round1/loss")
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert len(list((folder / "out").glob("stages/chat-1/checkpoint-*/brainstacks_guard.json"))) == 1
    return config, folder / "out"


@pytest.mark.parametrize(
    ("top", "block", "different"),
    [
        ({"logging_steps": 2, "save_steps": 2}, {}, None),  # and all of it in another place
        ({"lora_r": 8}, {}, "`lora_r`"),
        ({"learning_rate": 5e-3, "lr_scheduler": None}, {}, "`learning_rate`, `lr_scheduler`"),
        ({}, {"num_experts": 2}, "`brainstacks.num_experts`"),
        ({}, {"library": "another"}, "the library's place as seen from `output_dir`"),
    ],
    ids=str,
)
def test_checkpoints_count_for_the_same_library_and_config(
    stopped: tuple[dict[str, Any], Path],
    tmp_path: Path,
    top: dict[str, Any],
    block: dict[str, Any],
    different: str | None,
) -> None:
    config, out = stopped
    shutil.copytree(out, tmp_path / "out")
    if "library" in block:
        block = {"library": str(tmp_path / "another")}
    config = config | {"output_dir": str(tmp_path / "out")} | top
    config["brainstacks"] = config["brainstacks"] | block
    log = train(config, tmp_path)
    assert ("Resuming chat, round 1" in log) == (different is None)
    refused = f"are of another library, config or data, and are not resumed from (different: {different})"
    assert (refused in log) == (different is not None)
    library = Library.open(block.get("library", tmp_path / "out" / "library"))
    assert library.verify() == [] and library.manifest.domain("chat").rounds[0].steps == 8
    assert not (tmp_path / "out" / "stages").exists()


def test_checkpoints_of_earlier_versions_do_not_say_what_differs(
    stopped: tuple[dict[str, Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "chat-1"
    shutil.copytree(stopped[1] / "stages/chat-1", folder)
    (path,) = folder.glob("checkpoint-*/brainstacks_guard.json")
    state = json.loads(path.read_text())
    assert state["fingerprint_parts"].pop("`lora_r`") and state.pop("fingerprint_parts")
    path.write_text(json.dumps(state))
    assert last_complete_checkpoint(folder, Fingerprint(state["fingerprint"], {"`lora_r`": "0"})) == path.parent
    assert not caplog.messages
    assert last_complete_checkpoint(folder, Fingerprint.of({"lora_r": 8})) is None
    assert caplog.messages[0].endswith("are not resumed from") and str(folder) in caplog.messages[0]


@pytest.fixture
def two_ranks(undisturbed: tuple[dict[str, Any], Path, float], tmp_path: Path) -> dict[str, Any]:
    config = undisturbed[0] | {"micro_batch_size": 1, "save_steps": 1000, "output_dir": str(tmp_path / "out")}
    return with_engine(config, "zero2", tmp_path)


def test_a_signal_to_one_rank_after_the_other_stops_both_at_one_step(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    processes = start_ranks(two_ranks, tmp_path)
    log = wait_for(processes, tmp_path, "round1/loss")
    for process in processes:
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(0.2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [128 + signal.SIGINT] * 2
    for text in ("stopping after this step", "Stopped. The checkpoint of chat, round 1"):
        assert log.read_text().count(text) == 1, text
    (checkpoint,) = (tmp_path / "out").glob("stages/chat-1/checkpoint-*")
    assert (checkpoint / "brainstacks_guard.json").exists()
    assert len(list(checkpoint.glob("global_step*/*optim_states.pt"))) == 2
    assert Library.open(tmp_path / "out" / "library").verify() == []
    train_ranks(two_ranks, tmp_path)
    assert "Resuming chat, round 1" in log.read_text()
    assert Library.open(tmp_path / "out" / "library").verify() == []


def test_a_killed_rank_ends_the_other_one_with_an_error(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    processes = start_ranks(two_ranks, tmp_path)
    log = wait_for(processes, tmp_path, "round1/loss")
    processes[1].kill()
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert "by peer" in log.read_text()
    with Library.open(tmp_path / "out" / "library").writing() as library:
        assert library.verify() == []
