"""What a person sees of `axolotl train`: progress, mistakes in one line; and that a refused run leaves nothing behind."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from support.models import base_config, chat_dataset, run_axolotl, write_rows
from support.processes import finish, start_ranks, train, train_on_terminal

from axolotl_brainstacks import errors
from axolotl_brainstacks.curriculum.data_files import check_data_files
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.progress import duration
from axolotl_brainstacks.library import Library

EVALUATION = re.compile(
    r"^chat 1/1 · step (\d)/4( · loss \d\.\d{3})? · validation loss \d\.\d{3} \((start|best|best \d\.\d{3})\)( · \d+ s left)?$"
)


def tiny_config(model: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """One short round per domain."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = [
        {"name": name, "datasets": [chat_dataset(write_rows(folder / f"{name}.jsonl", 12, Random(name)))]}
        for name in names
    ]
    block = {
        "boosting": {"max_rounds": 1}, "null_space": {"directions": 0}, "samples": {"prompts": 0}, "domains": domains,
    }  # fmt: skip
    return base_config(
        model, folder / "runs" / "out", adapter="brainstacks", max_steps=4, eval_steps=2, val_set_size=4,
        dataset_prepared_path=str(folder / "rows" / "prepared"), learning_rate=1e-2, brainstacks=block,
    )  # fmt: skip


def evaluations(output: str) -> list[re.Match[str]]:
    return [found for line in output.splitlines() if (found := EVALUATION.match(line))]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file's content, and every folder; the log of the test and locks, which have to outlive their holder, are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in ("train.log", "config.yml", ".lock")
    }


# Progress


@pytest.fixture(scope="module")
def on_a_terminal(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a training has written to a terminal, and its folder."""
    folder = tmp_path_factory.mktemp("terminal")
    environment = {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "", "AXOLOTL_TEE_STDOUT": "1"}
    return train_on_terminal(tiny_config(tiny_llama_dir, folder, ["chat"]), folder, environment), folder


def assert_told(output: str) -> None:
    """A line for each evaluation, and nothing of the Trainer's own."""
    found = evaluations(output)
    assert [match[1] for match in found] == ["0", "2", "4"]
    assert found[0][3] == "start" and not found[0][4] and found[1][4] and not found[2][4]
    for unwanted in ("chat/round1/", "train_runtime", "| 4/4 ["):
        assert unwanted not in output


def test_on_a_terminal_one_more_line_follows_the_steps(on_a_terminal: tuple[str, Path]) -> None:
    output, _ = on_a_terminal
    assert re.search(r"\r\x1b\[2K[━─]{20} · chat 1/1 · step \d/4 · .*best \d", output)
    # It is erased before any other line is written.
    assert_told("\n".join(line.rpartition("\x1b[2K")[2] for line in output.splitlines()))
    assert not output.rstrip().endswith("left")


def test_axolotls_log_file_has_the_lines_that_stay(on_a_terminal: tuple[str, Path]) -> None:
    kept = (on_a_terminal[1] / "runs/out/debug.log").read_text()
    assert len(evaluations(kept)) == 3 and "\x1b" not in kept and "Running evaluation step" in kept


def test_plain_lines_where_no_color_asks_for_them(tiny_llama_dir: Path, tmp_path: Path) -> None:
    environment = {"TERM": "xterm", "NO_COLOR": "1"}
    output = train_on_terminal(tiny_config(tiny_llama_dir, tmp_path, ["chat"]), tmp_path, environment)
    assert_told(output.replace("\r\n", "\n"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output.replace("\r\n", "\n")) and "━" not in output


def test_plain_lines_in_a_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    output = train(tiny_config(tiny_llama_dir, tmp_path, ["chat"]), tmp_path, debug=False)
    assert_told(output)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", output)


def test_one_of_two_ranks_tells_the_progress(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat"]) | {"micro_batch_size": 1}
    log = finish(start_ranks(config, tmp_path, debug=False), tmp_path)
    assert [match[1] for match in evaluations(log)] == ["0", "2", "4"]


def test_debug_prints_the_metrics_that_reporters_get(tiny_llama_dir: Path, tmp_path: Path) -> None:
    log = train(tiny_config(tiny_llama_dir, tmp_path, ["chat"]), tmp_path)
    assert "'chat/round1/loss'" in log and "'chat/round1/eval_loss'" in log
    assert len(evaluations(log)) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59.4, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (4800, "1 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Mistakes


def without_data(config: dict[str, Any]) -> None:
    del config["brainstacks"]["domains"][1]["datasets"]


def damaged(config: dict[str, Any]) -> None:
    manifest = Path(config["brainstacks"]["library"]) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])


def without_a_stack(config: dict[str, Any]) -> None:
    (Path(config["brainstacks"]["library"]) / "stacks/s001_chat/adapter_model.safetensors").unlink()


def second(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["brainstacks"]["domains"][1].update(keys)


# The mistake, what the line says, and whether the library is there before.
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str, bool]] = {
    "wrong key": (
        lambda config: config["brainstacks"].update(top_kk=2),
        "brainstacks.top_kk` .* did you mean `top_k`",
        False,
    ),
    "no data": (without_data, "`datasets:` is missing in domain `math`", False),
    "bad name": (second(name="My Domain"), "`My Domain` cannot be a domain's name; use lower-case", False),
    "a value of a domain": (second(learning_rate=-1), "`learning_rate` of domain `math` is -1; it must be", False),
    "no such model": (
        lambda config: config.update(base_model="./nowhere/model"),
        "`base_model` is ./nowhere/model, and there is no such folder",
        False,
    ),
    "a file as output": (
        lambda config: config.update(output_dir=f"{config['brainstacks']['domains'][0]['datasets'][0]['path']}/out"),
        r"`output_dir` is .*, but .*\.jsonl is a file: name a folder",
        False,
    ),
    "no such file": (
        second(datasets=[chat_dataset(Path("none.jsonl"))]),
        "`datasets` of domain `math`: there is no none.jsonl: correct the path; a relative one starts at /",
        False,
    ),
    "no such test file": (
        second(test_datasets=[chat_dataset(Path("/nowhere/test.jsonl"))]),
        "`test_datasets` of domain `math`: there is no /nowhere/test.jsonl",
        False,
    ),
    "no such prompts": (
        second(brainstacks={"router_datasets": [{"path": "./held-out", "type": "chat_template"}]}),
        "`brainstacks.router_datasets` of domain `math`: there is no ./held-out",
        False,
    ),
    "no such pairs": (
        second(rl_rounds=[{"rl": "dpo", "datasets": [{"path": "json", "data_files": ["pairs*.jsonl"]}]}]),
        r"`data_files` in `datasets` of rl_rounds\[0\] of domain `math`: there is no pairs\*.jsonl",
        False,
    ),
    "after loading": (second(sequence_len=2), "The datasets of domain `math` .*(`sequence_len`|check)", False),
    "damaged manifest": (damaged, "manifest.json", True),
    "missing stack": (without_a_stack, "s001_chat.* is missing.*restore", True),
}


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the domain `chat`; never changed afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(tiny_llama_dir, folder, ["chat"])
    train(config, folder)
    return Path(config["output_dir"]) / "library"


def mistaken(model: Path, folder: Path, name: str, trained: Path) -> tuple[dict[str, Any], str]:
    change, message, library = MISTAKES[name]
    config = tiny_config(model, folder, ["chat", "math"])
    if library:
        config["brainstacks"]["library"] = str(shutil.copytree(trained, folder / "library"))
    change(config)
    return config, message


def assert_one_line(log: str, message: str) -> None:
    lines = [line for line in log.splitlines() if "Error: " in line]
    assert len(lines) == 1 and re.search(message, lines[0]), log[-3000:]
    assert "Traceback" not in log


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    tiny_llama_dir: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    config, message = mistaken(tiny_llama_dir, tmp_path, name, trained)
    before = tree(tmp_path)
    assert_one_line(train(config, tmp_path, expect=1, debug=False), message)
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_real_commands_end_in_one_line_and_leave_nothing_behind(
    tiny_llama_dir: Path, trained: Path, tmp_path: Path
) -> None:
    commands = [
        (["train", "--launcher", "python"], "wrong key"),
        (["train", "--launcher", "python"], "after loading"),
        (["train", "--launcher", "python"], "damaged manifest"),
        (["train", "--launcher", "python"], "missing stack"),
        (["train", "--launcher", "python"], "no such model"),
        (["preprocess"], "bad name"),
        (["preprocess"], "no such file"),
        (["inference", "--launcher", "python"], "missing library"),
    ]

    def run(number: int) -> tuple[str, str, bool]:
        (command, *options), name = commands[number]
        folder = tmp_path / str(number)
        if name == "missing library":
            config, message = tiny_config(tiny_llama_dir, folder, ["chat"]), "There is no library at .*library"
        else:
            config, message = mistaken(tiny_llama_dir, folder, name, trained)
        (folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
        before = tree(folder)
        # As for a user: with Axolotl's copy of all output in a log file, which a refused run has to close and remove.
        log = run_axolotl([command, "config.yml", *options], folder, {"AXOLOTL_TEE_STDOUT": "1"}, timeout=200, expect=1)
        return log, message, tree(folder) == before

    with ThreadPoolExecutor(2) as pool:
        for log, message, as_before in pool.map(run, range(len(commands))):
            assert_one_line(log, message)
            assert as_before, log[-2000:]


def test_all_missing_files_are_named_before_anything_is_loaded(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat", "math", "code"])
    for number in (1, 2):
        config["brainstacks"]["domains"][number]["datasets"][0]["path"] += ".jsonl"
    log = train(config, tmp_path, expect=1, debug=False)
    assert_one_line(
        log, "`datasets` of domain `math`: .*math.jsonl.jsonl; `datasets` of domain `code`: .*code.jsonl.jsonl"
    )
    assert "Loading the data of" not in log


def test_data_of_a_finished_domain_may_be_gone(tiny_llama_dir: Path, trained: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat", "math"])
    config["brainstacks"]["library"] = str(shutil.copytree(trained, tmp_path / "library"))
    chat = Path(config["brainstacks"]["domains"][0]["datasets"][0]["path"])
    chat.unlink()
    log = train(config, tmp_path, debug=False)
    told = f"`datasets` of domain `chat`: there is no {chat}; this run does without the data of domain chat"
    assert log.count(told) == 1
    assert Library.open(tmp_path / "library").manifest.domain("math").done
    assert told in train(config, tmp_path, debug=False).rpartition("Domain math is done")[2], "nothing to do"


@pytest.mark.parametrize("keys", [{}, {"float16": True}, {"load_in_4bit": True}], ids=str)
def test_another_precision_than_that_of_the_library_is_said_once(
    tiny_llama_dir: Path, trained: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat", "math"]) | keys
    config["brainstacks"]["library"] = str(shutil.copytree(trained, tmp_path / "library"))
    log = train(config, tmp_path, debug=False)
    kind = {"float16": "float16", "load_in_4bit": "float32, nf4 from float32"}.get(next(iter(keys), ""))
    said = f"The library was trained on its base model in float32, and this run loads it in {kind}: "
    assert log.count("The library was trained on its base model in") == log.count(said) == bool(keys)
    assert Library.open(tmp_path / "library").manifest.domain("math").done


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "tatsu-lab/alpaca"},
        {"path": "org/name.v2", "data_files": "data/train.jsonl"},
        {"path": "https://huggingface.co/data.jsonl"},
        {"path": "s3://bucket/data.parquet"},
        {"path": "json", "data_files": "https://host/data.json"},
    ],
    ids=str,
)
def test_what_is_not_on_this_machine_is_not_looked_for(
    tiny_llama_dir: Path, tmp_path: Path, entry: dict[str, Any]
) -> None:
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat"])
    config["brainstacks"]["domains"][0] |= {"datasets": [entry], "test_datasets": [entry]}
    plan = Plan.prepare(DictDefault(config))
    check_data_files(plan, ["chat"])
    plan.block.curriculum[0].overlay["datasets"].append({"path": "./nowhere"})
    with pytest.raises(ValueError, match=r"`datasets` of domain `chat`: there is no \./nowhere"):
        check_data_files(plan, ["chat"])


def test_two_ranks_say_it_once(tiny_llama_dir: Path, trained: Path, tmp_path: Path) -> None:
    for name in ("wrong key", "after loading"):
        folder = tmp_path / name.replace(" ", "-")
        config, message = mistaken(tiny_llama_dir, folder, name, trained)
        before = tree(folder)
        assert_one_line(finish(start_ranks(config, folder, debug=False), folder, expect=1), message)
        assert tree(folder) == before


def test_rows_that_were_found_good_need_not_be_prepared_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The mistake shows when the base model is there; all else that the run has made goes."""
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat"])
    config |= {"lora_target_linear": False, "lora_target_modules": ["q_proj", "nope"]}
    before = tree(tmp_path)
    assert_one_line(train(config, tmp_path, expect=1, debug=False), "`lora_target_modules` names 'nope'")
    after = tree(tmp_path)
    assert {path for path in after if not path.startswith("rows")} == set(before)
    assert any(path.endswith(".arrow") for path in after)


def test_what_was_there_before_is_never_removed(tiny_llama_dir: Path, trained: Path, tmp_path: Path) -> None:
    """An output folder and prepared rows of earlier, and a library in which a domain has begun."""
    config, message = mistaken(tiny_llama_dir, tmp_path, "after loading", trained)
    output, prepared = Path(config["output_dir"]), Path(config["dataset_prepared_path"])
    for folder in (output, prepared):
        folder.mkdir(parents=True)
        (folder / "mine.txt").write_text("mine")
    assert_one_line(train(config, tmp_path, expect=1, debug=False), message)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert (prepared / "mine.txt").read_text() == "mine" and len(list(prepared.iterdir())) > 1


def test_a_run_that_began_to_train_keeps_all_of_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """`math` packs into less than one batch, which shows when `chat` is trained already."""
    config = tiny_config(tiny_llama_dir, tmp_path, ["chat", "math"])
    config["brainstacks"]["domains"][1] |= {"micro_batch_size": 64, "dataloader_drop_last": True}
    log = train(config, tmp_path, expect=1, debug=False)
    assert_one_line(log, "The examples of `datasets` of domain `math` do not fill one batch")
    library = Library.open(Path(config["output_dir"]) / "library")
    assert library.manifest.domain("chat").done and library.verify() == []
    assert Path(config["dataset_prepared_path"]).is_dir() and (Path(config["output_dir"]) / "debug.log").exists()


def test_only_errors_raised_here_on_purpose_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    others: list[BaseException] = []
    cleaned: list[str] = []
    hook = errors.OneLine(lambda kind, error, traceback: others.append(error), lambda: cleaned.append("now"))

    def report(call: Callable[[], Any]) -> str:
        try:
            call()
        except Exception as error:
            hook(type(error), error, error.__traceback__)
        return capsys.readouterr().err

    assert report(lambda: duration(float("nan"))) == "" and len(others) == 1, "not by a `raise`"
    assert report(lambda: int("three")) == "" and len(others) == 2, "by Python"
    assert not cleaned
    assert report(lambda: Library.open("/nowhere\x1b[2J")).count("\n") == 1 and cleaned == ["now"] and len(others) == 2
