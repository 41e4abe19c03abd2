"""The command `axolotl brainstacks-library`: list, verify, remove; and it starts without heavy imports."""

import subprocess
import sys

import torch
from click.testing import CliRunner, Result
from random_library import alter_a_byte, truncate, weights
from random_library import library as library

from axolotl_brainstacks import cli
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.manifest import RouterEntry


def run(library: Library, *arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(cli.library, [str(library.path), *arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), "no traceback reaches the user"
    return result


def test_cli_list(library: Library) -> None:
    with library.writing():
        library.write_nullspace("code", {"q": torch.randn(4, 2)}, 2, 0.5, capacity_left=0.9)
        library.update_domain("code", done=True)
        library.set_router(RouterEntry(files={}, domains=["code"]))
    lines = run(library, "list").output.splitlines()
    chat, code = (next(line for line in lines if f"{name} " in line and "->" in line) for name in ("chat", "code"))
    assert "no" in chat and "none" in chat and "2.500 -> 1.500" in chat
    assert "yes" in code and "fitted" in code and "90%" in code


def test_cli_verify(library: Library) -> None:
    result = run(library, "verify")
    assert result.exit_code == 0 and result.output == "2 stacks, 6 files: clean\n"
    alter_a_byte(weights(library, "s001_chat"))
    truncate(weights(library, "s002_code"))
    result = run(library, "verify")
    assert result.exit_code == 1 and len(result.output.splitlines()) == 2
    assert "s001_chat" in result.output and "s002_code" in result.output
    (library.path / "manifest.json").write_text("{")
    result = run(library, "verify")
    assert result.exit_code == 1 and result.output.startswith("Error: ") and "manifest.json" in result.output


def test_cli_remove(library: Library) -> None:
    with library.writing():
        library.update_domain("code", context=["s001_chat", "s002_code"])
    result = run(library, "remove", "chat", answer="n\n")
    assert result.exit_code == 1 and "s001_chat" in result.output and "will change: code" in result.output
    assert [d.name for d in Library.open(library.path).manifest.domains] == ["chat", "code"]
    assert run(library, "remove", "chat", answer="y\n").exit_code == 0
    assert run(library, "remove", "code", "--yes").output == "Removed code.\n"
    assert Library.open(library.path).manifest.domains == []
    result = run(library, "remove", "code", "--yes")
    assert result.exit_code == 1 and "Error: domain 'code' is not in the library" in result.output


def test_nothing_heavy_is_imported() -> None:
    script = """import sys
import axolotl_brainstacks.cli
assert not {"axolotl", "peft", "torch", "transformers"} & set(sys.modules), "cli"
import axolotl_brainstacks.library
assert not {"axolotl", "peft", "transformers"} & set(sys.modules), "library"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
