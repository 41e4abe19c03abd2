"""The report page of a library."""

import base64
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.routed import new_library, tiny_base

from axolotl_brainstacks import cli
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.report import FORGETTING, FORGETTING_CHART, PAGE, ROUNDS_CHART, SAMPLES, read_records


def written(library: Library) -> str:
    result = CliRunner().invoke(cli.library, [str(library.path), "report"])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(library.path / PAGE)
    return (library.path / PAGE).read_text()


def test_the_page_holds_every_round_answer_and_picture(tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat", "math"], stacks=2)
    answer = {"domain": "math", "round": 2, "prompt": "1 < 2?", "answer": "<script>", "reference": "yes & no"}
    rows = [
        {"after": "chat", "own_stacks": {"chat": 1.5}, "all_stacks": {"chat": 1.5}},
        {"after": "math", "own_stacks": {"chat": 1.5, "math": 0.7}, "all_stacks": {"chat": 1.9, "math": 0.7}},
    ]
    with library.writing():
        library.write_file(FORGETTING, json.dumps(rows).encode())
        library.write_file(SAMPLES, json.dumps(answer).encode())
    page = written(library)
    assert page.count("<td>chat") == 2 and page.count("<td>math") == 3
    assert "&lt;script&gt;" in page and "<script>" not in page and "yes &amp; no" in page
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert pictures == [(library.path / file).read_bytes() for file in (ROUNDS_CHART, FORGETTING_CHART)]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert library.verify() == []


@pytest.mark.parametrize("file", [FORGETTING, SAMPLES])
@pytest.mark.parametrize("text", ['[{"after": "chat", "own', "{}", "7", "", "\xff", '[{"after": "chat"}]'])
def test_broken_records_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, text: str) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    path = library.path / file
    with library.writing():
        library.write_file(file, text.encode("latin-1"))
    assert "<td>chat" in written(library)
    if file == SAMPLES and not text:
        return  # no line is no record
    assert f"{path} cannot be read" in caplog.text and f"it is now {path}.broken" in caplog.text
    assert not path.exists() and path.with_name(f"{path.name}.broken").read_bytes() == text.encode("latin-1")
    library = Library.open(library.path)
    assert read_records(library, file) == [] and library.verify() == []


@pytest.mark.parametrize(
    "text",
    [
        '[{"after": 1, "own_stacks": {}, "all_stacks": {}}]',
        '[{"after": "chat", "own_stacks": {"chat": true}, "all_stacks": {}}]',
        "[" * 10**5,
        '[{"after": "$x^", "own_stacks": {}, "all_stacks": {}}]',  # matplotlib would take it for a formula
        '[{"after": "\\ud800", "own_stacks": {}, "all_stacks": {}}]',
    ],
)
def test_records_of_wrong_types_are_put_aside(tmp_path: Path, text: str) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    with library.writing():
        library.write_file(FORGETTING, text.encode())
    assert "<td>chat" in written(library)
    assert (library.path / f"{FORGETTING}.broken").read_text() == text


def test_altered_records_are_put_aside_and_odd_ones_are_drawn(tmp_path: Path) -> None:
    rows = [{"after": "chat", "own_stacks": {"chat": float("nan"), "law": 1.0}, "all_stacks": {}}] * 90
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    with library.writing():
        library.write_file(FORGETTING, json.dumps(rows).encode())
    assert written(library).count("base64") == 2
    path = library.path / FORGETTING
    path.write_text(path.read_text().replace("chat", "code"))
    written(library)
    assert path.with_name("forgetting.json.broken").exists() and Library.open(library.path).verify() == []


def test_a_library_without_records_has_a_page_too(tmp_path: Path) -> None:
    page = written(new_library(tmp_path / "library", tiny_base(), []))
    assert "0 domains, 0 frozen stacks" in page and "base64" not in page
