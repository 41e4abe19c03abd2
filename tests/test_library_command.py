"""The command `axolotl brainstacks-library`: list, verify, remove; and it starts without heavy imports."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.library_files import run
from support.random_library import (
    CONFIG,
    a_constraint,
    a_domain,
    a_round,
    alter_a_byte,
    new_library,
    some_tensors,
    truncate,
    weights,
)
from support.random_library import library as library

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry


def test_cli_list(library: Library) -> None:
    with library.writing():
        library.update_domain("code", done=True, constraint=a_constraint(["chat"], capacity_left=0.9))
        library.set_router(RouterEntry(files={}, domains=["code"]))
    lines = run(library, "list").output.splitlines()
    chat, code = (next(line for line in lines if f"{name} " in line and "->" in line) for name in ("chat", "code"))
    assert "no" in chat and "none" in chat and "2.500 -> 1.500" in chat
    assert "yes" in code and "fitted" in code and "90%" in code


def test_cli_list_fits_into_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the longest words of every column; a long name is broken, no other cell is."""
    monkeypatch.setenv("COLUMNS", "80")
    long = "d" * 32
    library = new_library(tmp_path / "library", "chat", long)
    with library.writing():
        for name in ("chat", long):
            constraint = a_constraint([], capacity_left=1.0)
            library.update_domain(name, base_loss=13.239, done=True, constraint=constraint)
        library.set_router(RouterEntry(files={}, domains=["chat", long]))
        library.replace_domain("chat")
        library.update_domain("chat", base_loss=13.239, constraint=constraint)
    lines = run(library, "list").output.splitlines()[1:]
    assert "…" not in "".join(lines) and max(map(len, lines[:-1])) <= 80
    assert lines[0].split() == ["domain", "done", "rounds", "stacks", "loss", "capacity", "MB", "router"]
    (chat,) = (line for line in lines if line.startswith("chat"))
    assert chat.split()[1] == "replacing" and "100%" in chat and chat.endswith(("fitted", "stale"))
    assert sum(line.strip("d ") == "" for line in lines) in (1, 2), "the rest of the long name"


def test_cli_list_counts_the_stacks_and_bytes_of_each_domain(library: Library) -> None:
    with library.writing():
        library.add_stack("code", 2, CONFIG, some_tensors(4000), a_round(2))
        library.update_domain("chat", done=True)
        library.replace_domain("chat")
    for name in ("chat", "code"):
        (line,) = (line for line in run(library, "list").output.splitlines() if line.startswith(name))
        cells = line.split()
        assert cells[3] == str(len(library.manifest.stacks_of(name)))
        assert cells[-2] == f"{library.manifest.bytes_of(name) / 1e6:.1f}"


def test_cli_verify(library: Library) -> None:
    result = run(library, "verify")
    sha256 = hashlib.sha256((library.path / "manifest.json").read_bytes()).hexdigest()
    pinned, clean = result.output.splitlines()
    assert result.exit_code == 0 and clean == "2 stacks, 6 files: clean"
    assert sha256 in pinned and sha256 in run(library, "list").output
    alter_a_byte(weights(library, "s001_chat"))
    truncate(weights(library, "s002_code"))
    result = run(library, "verify")
    first, second, pinned, last = result.output.splitlines()
    assert result.exit_code == 1 and sha256 in pinned
    for line, domain, stack in ((first, "chat", "s001_chat"), (second, "code", "s002_code")):
        remedy = f"remove domain `{domain}` with `axolotl brainstacks-library {library.path} remove {domain}`"
        assert stack in line and "restore the file from a copy" in line and remedy in line
    assert last.startswith("2 problems: restore the library from a copy") and "verify again" in last
    (library.path / "manifest.json").write_text("{")
    result = run(library, "verify")
    assert result.exit_code == 1 and result.output.startswith("Error: ") and "manifest.json" in result.output


def test_cli_remove(library: Library) -> None:
    with library.writing():
        library.update_domain("code", context=["s001_chat", "s002_code"])
    result = run(library, "remove", "chat", answer="n\n")
    assert (
        result.exit_code == 1 and "s001_chat" in result.output and "code was trained with s001_chat on" in result.output
    )
    assert [d.name for d in Library.open(library.path).manifest.domains] == ["chat", "code"]
    assert run(library, "remove", "chat", answer="y\n").exit_code == 0
    assert run(library, "remove", "code", "--yes").output.splitlines()[1:] == ["Removed code."]
    assert Library.open(library.path).manifest.domains == []
    result = run(library, "remove", "code", "--yes")
    assert result.exit_code == 1 and "Error: domain 'code' is not in the library" in result.output


def test_remove_says_in_numbers_what_else_changes(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"q": torch.eye(4)[:, :2]}
    with library.writing():
        for name in ("law", "math"):
            library.add_domain(a_domain(name), b"rows")
            library.add_stack(name, 1, CONFIG, some_tensors(), a_round(loss=1.25))
        library.update_domain("code", context=["s001_chat", "s002_code"])
        for name, beyond in (("chat", []), ("code", ["chat"]), ("law", ["chat", "code"])):
            library.write_protection(name, columns, 0.5, 0.5, beyond)
        library.set_router(RouterEntry(files={}, domains=["chat", "code"]))
    folders = [library.path / "stacks/s001_chat", library.path / "validation", library.path / "nullspace"]
    files = [
        path for folder in folders for path in folder.iterdir() if folder.name == "s001_chat" or "chat" in path.name
    ]
    size = sum(path.stat().st_size for path in files)
    lines = run(library, "remove", "chat", answer="n\n").output.splitlines()
    assert f"To go: 1 stack (s001_chat), {size:,} bytes in all" in lines
    (changed,) = (line for line in lines if line.startswith("code was trained"))
    assert "s001_chat on" in changed and "1.5000" in changed
    assert (
        "The next training run fits the columns again that protect code, law" in lines
        and "The router will be stale" in lines
    )
    alone, *others = run(library, "remove", "math", answer="n\n").output.splitlines()
    assert alone.startswith("To go: 1 stack (s004_math)") and others[0] == "The router will be stale"
    assert len(Library.open(library.path).manifest.domains) == 4
    result = run(library, "remove", "chat", "--yes")
    assert result.output.endswith("Removed chat. Fit the router again: axolotl brainstacks-router CONFIG\n")
    after = Library.open(library.path)
    assert [entry.protection for entry in after.manifest.domains] == [None] * 3 and after.verify() == []
    assert "killed run" not in caplog.text, "nobody was killed: the stack was removed"


def test_cli_replace(library: Library) -> None:
    with library.writing():
        library.update_domain("chat", done=True)
        library.update_domain("code", context=["s001_chat", "s002_code"], done=True)
    before = (library.path / "manifest.json").read_bytes()
    result = run(library, "replace", "law", "--yes")
    assert result.exit_code == 1 and "'law' is not in the library, which has chat, code" in result.output
    result = run(library, "replace", "chat", answer="n\n")
    assert result.exit_code == 1 and "s001_chat" in result.output and ": code" in result.output
    result = run(library, "replace", "chat", "--undo")
    assert result.exit_code == 1 and "'chat' is not being replaced" in result.output
    assert (library.path / "manifest.json").read_bytes() == before
    assert "its old stacks answer" in run(library, "replace", "chat", answer="y\n").output
    assert not Library.open(library.path).manifest.domain("chat").done
    assert "replacing" in run(library, "list").output
    result = run(library, "replace", "chat", "--yes")
    assert result.exit_code == 1 and "--undo" in result.output
    with library.writing():
        library.add_stack("chat", 1, CONFIG, some_tensors(), a_round())
    result = run(library, "replace", "chat", "--undo", answer="n\n")
    assert result.exit_code == 1 and "s003_chat" in result.output
    undone = run(library, "replace", "chat", "--undo", "--yes").output
    assert (
        undone == "chat answers as it did. The columns that protect it are fitted again by the next `axolotl train`.\n"
    )
    after = Library.open(library.path)
    assert after.manifest.domain("chat").done and after.verify() == []
    assert [stack.name for stack in after.manifest.stacks] == ["s001_chat", "s002_code"]


def test_cli_join(library: Library, tmp_path: Path) -> None:
    other = new_library(tmp_path / "other", "chat", "law", base=library.manifest.base)
    with other.writing():
        for name in ("chat", "law"):
            other.update_domain(name, done=True)
    result = run(library, "join", str(other.path), "--as", "talk")
    assert result.exit_code == 1 and "'talk'" in result.output and "NEW=OLD" in result.output
    result = run(library, "join", str(other.path))
    assert result.exit_code == 1 and "two domains `chat`" in result.output
    result = run(library, "join", str(other.path), "--as", "talk=chat")
    assert result.output.startswith(f"Joined talk, law from {other.path}: 2 stacks (s003_talk, s004_law)")
    result = run(library, "join", str(other.path), "--domain", "law", "--as", "contracts=law")
    assert result.exit_code == 0
    names = [entry.name for entry in Library.open(library.path).manifest.domains]
    assert names == ["chat", "code", "talk", "law", "contracts"]


def test_nothing_heavy_is_imported() -> None:
    script = """import sys
import axolotl_brainstacks.cli
assert not {"axolotl", "peft", "torch", "transformers"} & set(sys.modules), "cli"
import axolotl_brainstacks.library
assert not {"axolotl", "peft", "transformers"} & set(sys.modules), "library"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
