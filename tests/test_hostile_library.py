"""A library from a stranger, or one in disorder: nothing outside it changes, and nothing of the user's is lost."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from support.library_files import edited, run
from support.models import base_config
from support.random_library import CONFIG, a_domain, a_round, alter_a_byte, some_tensors, truncate, weights
from support.random_library import library as library

from axolotl_brainstacks import cli
from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.preflight import LibraryState, check_library, done_domains
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry
from axolotl_brainstacks.library.lora_import import import_lora
from axolotl_brainstacks.library.report import FORGETTING, PAGE, ROUTER_CHART, write_report

FOLDERS = ["stacks", "validation", "nullspace", "router", "report", ".tmp", ".leftovers", "router/discovery"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's, with files and folders named as a library's are."""
    folder = tmp_path / "outside"
    for name in ("ghost.safetensors", "ghost-0123456789ab.safetensors", "manifest.json", "report.html", "s009_ghost/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} is mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def linked(library: Library, relative: str, target: Path) -> None:
    """Put a link in place of a folder of the library; what was in it is at the link's target too."""
    path = library.path / relative
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        shutil.copytree(path, target, dirs_exist_ok=True)
        shutil.rmtree(path)
    path.symlink_to(target)


# Links


@pytest.mark.parametrize("relative", FOLDERS)
def test_nothing_is_read_written_or_removed_through_a_linked_folder(
    library: Library, outside: Path, relative: str
) -> None:
    linked(library, relative, outside)
    before = contents(outside)
    message = rf"{library.path / relative} is a symbolic link"
    with pytest.raises(ValueError, match=message):
        Library.open(library.path)
    with pytest.raises(ValueError, match=message), library.writing():
        pass
    for command in (["list"], ["verify"], ["report"], ["remove", "chat", "--yes"]):
        result = run(library, *command)
        assert result.exit_code == 1 and "is a symbolic link" in result.output
    assert contents(outside) == before


def test_the_folder_of_a_stack_is_a_real_one(library: Library, outside: Path) -> None:
    linked(library, "stacks/s001_chat", outside)
    before = contents(outside)
    for read in (library.stack_tensors, library.stack_config):
        with pytest.raises(ValueError, match="s001_chat is a symbolic link"):
            read("s001_chat")
    assert "s001_chat is a symbolic link" in library.verify()[0]
    assert run(library, "remove", "chat", "--yes").exit_code == 0
    assert contents(outside) == before and not (library.path / "stacks/s001_chat").is_symlink()


@pytest.mark.parametrize("name", [".lock", ".lock.owner"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo"])
def test_the_locks_files_lead_nowhere(library: Library, outside: Path, name: str, kind: str) -> None:
    path = library.path / name
    path.unlink(missing_ok=True)
    before = contents(outside)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("report.html" if kind == "link" else "new"))
    with pytest.raises(ValueError, match=rf"{path} is no regular file.*delete it"), library.writing():
        pass
    assert contents(outside) == before
    path.unlink()
    with library.writing():
        library.remove_domain("chat")


def test_a_second_name_of_a_file_is_not_written_through(library: Library, outside: Path) -> None:
    (library.path / ".lock.owner").unlink(missing_ok=True)
    os.link(outside / "report.html", library.path / ".lock.owner")
    with library.writing():
        assert (library.path / ".lock.owner").stat().st_nlink == 1
    assert (outside / "report.html").read_text() == "report.html is mine"


def test_create_writes_into_the_new_folder_alone(library: Library, outside: Path, tmp_path: Path) -> None:
    before, base = contents(outside), library.manifest.base
    new = tmp_path / "new"
    new.mkdir()
    (new / ".tmp").symlink_to(outside)
    with pytest.raises(ValueError, match=r"\.tmp is a symbolic link"):
        Library.create(new, base)
    (new / ".tmp").unlink()
    (new / ".tmp").mkdir()
    (new / ".tmp/manifest.json").symlink_to(outside / "manifest.json")
    assert Library.create(new, base).verify() == []
    assert contents(outside) == before


def test_a_library_of_links_to_files_works(library: Library, tmp_path: Path) -> None:
    """The Hub's cache is made so; and its root may be a link."""
    with library.writing():
        library.write_root_config(CONFIG | {"library": "."})
        library.write_file(FORGETTING, b"[]")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, (relative, data) in enumerate(contents(library.path).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / relative).symlink_to(blobs / str(number))
    (snapshot / ".lock").unlink(missing_ok=True)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        cached = Library.open(path)
        assert cached.verify() == [] and cached.manifest == library.manifest
        assert cached.stack_tensors("s001_chat").keys() == library.stack_tensors("s001_chat").keys()
        assert cached.validation("chat") == library.validation("chat")
    before = contents(blobs)
    with cached.writing():
        cached.remove_domain("chat")
        write_report(cached)
    assert cached.verify() == [] and contents(blobs) == before


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("content", [b"a secret", PNG + b"a private picture"])
def test_the_page_embeds_no_file_from_elsewhere(library: Library, tmp_path: Path, content: bytes, listed: bool) -> None:
    (tmp_path / "secret").write_bytes(content)
    with library.writing():
        if listed:
            library.write_file(ROUTER_CHART, PNG + b"a picture of ours")
        (library.path / ROUTER_CHART).parent.mkdir(exist_ok=True)
        (library.path / ROUTER_CHART).unlink(missing_ok=True)
        (library.path / ROUTER_CHART).symlink_to(tmp_path / "secret")
        write_report(library)
    assert "The router on unseen prompts" not in (library.path / PAGE).read_text()


def test_a_fifo_in_place_of_a_file_blocks_nobody(library: Library) -> None:
    with library.writing():
        library.write_file(FORGETTING, b"[]")
    for relative in ("stacks/s001_chat/adapter_model.safetensors", "validation/code.safetensors", FORGETTING):
        (library.path / relative).unlink()
        os.mkfifo(library.path / relative)
    assert ["is no regular file" in problem for problem in library.verify()] == [True] * 3
    with library.writing():
        write_report(library)
    assert (library.path / f"{FORGETTING}.broken").is_fifo()


# What is listed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["domains"][0]["protection"].update(file="stacks/s001_chat/adapter_model.safetensors"), "nullspace/"),
        (lambda m: m["domains"][0].update(validation_file="stacks/s001_chat/adapter_config.json"), "validation/"),
        (lambda m: m["domains"][0].update(validation_file="validation/code.safetensors"), "'chat' and 'code'"),
        (lambda m: m["records"].update({"manifest.json": m["records"].popitem()[1]}), r"manifest\.json is listed among"),
        (lambda m: m["router"].update(domains=["chat", "law"]), "router knows domain 'law'"),
        (lambda m: m["router"]["files"].update({"stacks/x": m["records"].popitem()[1]}), "stacks/x is listed among"),
        (lambda m: m["root"].update({"README.md": m["records"].popitem()[1]}), r"root lists README\.md"),
        (lambda m: m["pending"].update({"report/x": m["records"].popitem()[1]}), "report/x is about to change"),
        (lambda m: m["records"].update({"report//x": m["records"].popitem()[1]}), "not written as"),
        (lambda m: m["stacks"][0]["files"].pop("adapter_config.json"), r"lists no adapter_config\.json"),
        (lambda m: m["stacks"][0].update(round=True), r"stacks\.0\.round"),
        (lambda m: m["stacks"][0].update(round="1"), r"stacks\.0\.round"),
        (lambda m: m["domains"][0].update(done=1), r"domains\.0\.done"),
        (lambda m: m["domains"][0].update(replaced=["s002_code"]), "'s002_code', which is not its own"),
        (lambda m: m["domains"][0]["rounds"][0].update(stack="s002_code"), "'chat' made stack 's002_code'.*not its own"),
        (lambda m: m["domains"][0]["rounds"][0].update(stack="s009_gone"), "'chat' made stack 's009_gone'.*not its own"),
        (lambda m: m["domains"][0]["rounds"][0].update(objective_after=1.0), "objective_after, but no objective_before"),
        (lambda m: m.update(next_stack=10**9 + 1), "next_stack"),
        (lambda m: m["domains"][0]["protection"].update(energy="NaN"), r"protection\.energy"),
        (lambda m: m["domains"][0]["validation"].update(bytes=-1), r"validation\.bytes"),
        (lambda m: m["domains"][0]["validation"].update(sha256="0"), r"validation\.sha256"),
        (lambda m: m.update({"\x1b[2J": 1}), r"damaged at \\x1b\[2J"),
    ],
)  # fmt: skip
def test_manifests_that_no_library_writes(library: Library, change: Callable[[dict], object], message: str) -> None:
    with library.writing():
        library.write_protection("chat", {"q": torch.eye(4)[:, :2]}, 0.5, 0.5, [])
        library.write_file(FORGETTING, b"[]")
        library.set_router(RouterEntry(files={}, domains=["chat"]))
    Library.open(library.path)
    edited(library, change)
    with pytest.raises(ValueError, match=message) as caught:
        Library.open(library.path)
    assert str(library.path / "manifest.json") in str(caught.value) and str(caught.value).isprintable()


def test_a_library_without_a_number_left_gets_no_stack(library: Library) -> None:
    edited(library, lambda m: m.update(next_stack=10**9))
    full = Library.open(library.path)
    assert full.verify() == []
    with pytest.raises(ValueError, match=r"next_stack in manifest\.json is 1000000000.*restore"), full.writing():
        full.add_stack("code", 2, CONFIG, some_tensors(), a_round(2))
    assert Library.open(library.path).verify() == []


@pytest.mark.timeout(60)
def test_a_manifest_of_millions_of_values_is_refused_at_once(library: Library) -> None:
    (library.path / "manifest.json").write_text(f'{{"schema_version": 2, "x": [{"[]," * (20 * 2**20)}[]]}}')
    with pytest.raises(ValueError, match=r"manifest\.json .*more than 2097152 values.*restore"):
        Library.open(library.path)


def test_a_manifest_that_could_not_be_read_again_is_not_written(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (library.path / "manifest.json").read_bytes()
    monkeypatch.setattr("axolotl_brainstacks.library.manifest.MAX_JSON_BYTES", len(before))
    too_large = pytest.raises(ValueError, match=r"manifest\.json would be too large to be read again.*new library")
    with too_large, library.writing():
        library.add_domain(a_domain("law"), b"rows of law")
    assert (library.path / "manifest.json").read_bytes() == before and library.verify() == []


def test_verify_names_a_long_path_in_short(library: Library) -> None:
    folder = library.path / "validation"
    for _ in range(8):
        folder /= "x" * 200
    folder.mkdir(parents=True)
    (folder / "end.safetensors").write_text("")
    (problem,) = library.verify()
    assert (
        len(problem) < 400
        and problem.startswith(str(library.path)[:100])
        and "xx/end.safetensors is unknown" in problem
    )


NO_MANIFESTS = ["[" * 10**5, '{"schema_version": 2, "schema_version": 2}', "[]", "2", '{"schema_version": [2]}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_files_that_are_no_manifest(library: Library, content: str) -> None:
    (library.path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json .*(restore|install)"):
        Library.open(library.path)


@pytest.mark.parametrize("file", ["router/discovery/chat.jsonl", "router/evaluation.json", FORGETTING, ROUTER_CHART])
def test_every_file_that_a_command_reads_is_listed_and_checked(library: Library, file: str) -> None:
    with library.writing():
        library.write_file(file, b"something that was measured")
    assert library.verify() == [] and library.read_file(file) == b"something that was measured"
    alter_a_byte(library.path / file)
    (problem,) = Library.open(library.path).verify()
    assert f"{library.path / file} is altered" in problem and "axolotl brainstacks-" in problem
    with pytest.raises(ValueError, match="is altered"):
        library.read_file(file)
    assert library.damage() == [], "no reason not to train"


def test_a_file_that_is_about_to_change_is_whole_before_and_after(library: Library) -> None:
    """As a kill between the two changes of the manifest leaves it."""
    with library.writing():
        old = library.write_file(FORGETTING, b"old")
        new = library.write_file(FORGETTING, b"new")
    for content in (b"old", b"new"):
        (library.path / FORGETTING).write_bytes(content)
        records, pending = {FORGETTING: old.model_dump()}, {FORGETTING: new.model_dump()}
        edited(library, lambda m, records=records, pending=pending: m.update(records=records, pending=pending))
        killed = Library.open(library.path)
        assert killed.verify() == [] and killed.read_file(FORGETTING) == content
        with killed.writing():
            assert killed.manifest.pending == {} and killed.verify() == []
        (library.path / FORGETTING).write_bytes(b"xyz")
        assert len(killed.verify()) == 1


# Nothing is lost


def test_a_manifest_one_stack_old_deletes_nothing(library: Library) -> None:
    older = (library.path / "manifest.json").read_bytes()
    with library.writing():
        library.add_domain(a_domain("law"), b"rows of law")
        library.add_stack("law", 1, CONFIG, some_tensors(), a_round())
    stack, rows = contents(library.stack_path("s003_law")), b"rows of law"
    (library.path / "manifest.json").write_bytes(older)
    old = Library.open(library.path)
    with old.writing():
        assert old.add_stack("code", 2, CONFIG, some_tensors(), a_round(2)).name == "s003_code"
    kept_rows, kept_stack = sorted(old.leftovers(), key=lambda path: path.name.rpartition("Z-")[2])
    assert kept_rows.read_bytes() == rows and contents(kept_stack) == stack
    assert old.verify() == []
    output = run(old, "verify").output
    assert str(kept_stack) in output and "to be deleted by hand" in output


def test_a_file_of_the_user_is_moved_aside_and_never_deleted(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("mine.safetensors", "mine-0123456789ab.safetensors"):
        (library.path / "validation" / name).write_bytes(name.encode())
    for _ in range(2):
        with library.writing():
            library.add_domain(a_domain("mine"), b"rows")
            library.remove_domain("mine")
        (library.path / "validation/mine.safetensors").write_bytes(b"another")
    with library.writing():
        pass
    assert sorted(path.read_bytes() for path in library.leftovers()) == sorted(
        [b"mine.safetensors", b"mine-0123456789ab.safetensors", b"another", b"another"]
    )
    assert "delete that when nothing is missing" in caplog.text


def test_threads_of_one_process_wait_for_each_other(library: Library) -> None:
    errors: list[BaseException] = []

    def add(first: int) -> None:
        try:
            mine = Library.open(library.path)
            for number in range(first, first + 7):
                with mine.writing():
                    mine.add_domain(a_domain(f"d{number}"), b"rows")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(100 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads)
    after = Library.open(library.path)
    assert len(after.manifest.domains) == 2 + 21 and after.verify() == [] and after.leftovers() == []


def test_another_thread_is_no_writer(library: Library) -> None:
    refused = []

    def change() -> None:
        try:
            library.add_domain(a_domain("law"))
        except AssertionError as error:
            refused.append(str(error))

    with library.writing():
        thread = threading.Thread(target=change)
        thread.start()
        thread.join(60)
    assert refused and "writing" in refused[0]


def test_the_hosts_name_stays_here(library: Library) -> None:
    owner = library.path / ".lock.owner"
    with library.writing():
        assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert not owner.exists()


# Text


def test_what_a_library_says_reaches_the_terminal_as_text(library: Library) -> None:
    hostile = "x[/b][red]\x1b[2J\u202e"
    edited(library, lambda m: m["base"].update(name=hostile))
    (library.path / "stacks/\x1b[2J.safetensors").write_text("")
    for command in (["list"], ["verify"]):
        result = run(library, *command)
        assert "\x1b" not in result.output and "\u202e" not in result.output and r"\x1b[2J" in result.output
    assert r"x[/b][red]\x1b[2J\u202e" in run(library, "list").output.replace("\n", "")
    edited(library, lambda m: m["domains"][0].update({"\x1b[2J": hostile}))
    result = run(library, "list")
    assert result.exit_code == 1 and "\x1b" not in result.output and r"\x1b[2J" in result.output


# Pinning


def test_a_pinned_library_is_the_one_that_was_seen(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = library.sha256 = Library.open(library.path).sha256
    assert Library.open(library.path, pin).sha256 == pin
    monkeypatch.setenv("BRAINSTACKS_LIBRARY_SHA256", pin)
    assert run(library, "verify").exit_code == run(library, "verify", "--against", pin).exit_code == 0
    with Library.open(library.path).writing() as opened:
        opened.update_domain("chat", done=True)
        assert opened.sha256 != pin
    for action in (lambda: Library.open(library.path), lambda: Library.open(library.path, pin)):
        with pytest.raises(ValueError, match=rf"SHA-256 {pin} \(brainstacks\.library_sha256.*get the library.*or set"):
            action()
    assert Library.open(library.path, opened.sha256).sha256 == opened.sha256
    monkeypatch.delenv("BRAINSTACKS_LIBRARY_SHA256")
    assert "get the library that was pinned" in run(library, "verify", "--against", pin).output
    for wrong in ("", "x" * 64, pin.upper(), pin[:12]):
        assert "64 digits" in run(library, "verify", "--against", wrong).output


def test_a_pin_without_its_library_makes_no_new_one(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINSTACKS_LIBRARY_SHA256", "0" * 64)
    new = tmp_path / "new"
    (tmp_path / "adapter").mkdir()
    plan = Plan({}, BrainstacksBlock(domain="law"), new, inference=False)
    for action in (
        lambda: Library.create(new, library.manifest.base),
        lambda: check_library(plan),
        lambda: import_lora(new, "law", tmp_path / "adapter"),
    ):
        with pytest.raises(
            ValueError, match=rf"BRAINSTACKS_LIBRARY_SHA256 is set, but {new} is not a library.*get the"
        ):
            action()
    assert not new.exists()


def test_the_yaml_pins_a_library_before_anything_is_loaded(library: Library, tmp_path: Path) -> None:
    def pinned(path: Path, sha256: str) -> Plan:
        return Plan({}, BrainstacksBlock(domain="law", library_sha256=sha256), path, inference=False)

    def config(sha256: str) -> DictDefault:
        block = {"library": str(library.path), "library_sha256": sha256, "domain": "law"}
        keys = {"datasets": [{"path": "x", "type": "alpaca"}], "inference": True}
        return DictDefault(base_config(tmp_path, tmp_path / "out", adapter="brainstacks", brainstacks=block) | keys)

    pin = Library.open(library.path).sha256
    plan = pinned(library.path, pin)
    LibraryState.same_for_all(plan)
    check_library(plan)
    assert done_domains(plan) == set()
    Plan.prepare(config(pin))
    with library.writing():
        library.update_domain("chat", done=True)
    for action in (
        lambda: LibraryState.same_for_all(plan),
        lambda: check_library(plan),
        lambda: Plan.prepare(config(pin)),
    ):
        with pytest.raises(ValueError, match=r"brainstacks\.library_sha256.*get the library that was pinned"):
            action()
    with pytest.raises(ValueError, match="is not a library"):
        check_library(pinned(tmp_path / "new", pin))
    with pytest.raises(ValueError, match="library_sha256"):
        BrainstacksBlock.parse({"domain": "law", "library_sha256": pin[:12]})


def test_verify_says_what_it_does_not_cover(library: Library) -> None:
    assert library.not_covered() == [] and "Not covered" not in run(library, "verify").output
    for name in ("README.md", "router/discovery/old.jsonl", "stacks/s001_chat/notes.txt"):
        (library.path / name).parent.mkdir(parents=True, exist_ok=True)
        (library.path / name).write_text("x")
    assert library.not_covered() == ["README.md", "router/discovery/old.jsonl", "stacks/s001_chat/notes.txt"]
    result = CliRunner().invoke(cli.library, [str(library.path), "verify"])
    assert (
        result.exit_code == 0 and "README.md, router/discovery/old.jsonl, stacks/s001_chat/notes.txt" in result.output
    )


def test_damage_is_told_from_disorder(library: Library) -> None:
    """The helpers of these tests do what they say."""
    truncate(weights(library, "s001_chat"))
    assert len(library.verify()) == 1 == len(library.damage())
