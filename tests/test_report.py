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
from axolotl_brainstacks.library.report import (
    FORGETTING,
    FORGETTING_CHART,
    PAGE,
    ROUNDS_CHART,
    ROUTER_CHART,
    SAMPLES,
    _rounds,
    read_records,
)


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


SAMPLE = {"domain": "chat", "round": 1, "prompt": "PLANTED", "answer": "a", "reference": "b"}
PNG = b"\x89PNG\r\n\x1a\n"


def plant(library: Library) -> None:
    (library.path / "report").mkdir(exist_ok=True)
    (library.path / SAMPLES).write_text(json.dumps(SAMPLE) + "\n")
    (library.path / ROUTER_CHART).write_bytes(PNG + b"planted")


def test_files_that_the_manifest_does_not_list_are_on_no_page(tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    plant(library)  # before the first report as well
    for _ in range(2):
        assert "PLANTED" not in (page := written(library)) and "The router on unseen" not in page
        output = CliRunner().invoke(cli.library, [str(library.path), "verify"]).output
        assert f"not read by any command: {ROUTER_CHART}, {SAMPLES}" in output
    with library.writing():
        library.write_file(SAMPLES, b"")
    assert [path.read_text() for path in library.leftovers()] == [json.dumps(SAMPLE) + "\n"], "it may be the user's"


def test_an_older_library_lists_the_files_of_its_report(tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    plant(library)
    manifest = json.loads((library.path / "manifest.json").read_text())
    del manifest["records"], manifest["pending"]
    (library.path / "manifest.json").write_text(json.dumps(manifest))
    output = CliRunner().invoke(cli.library, [str(library.path), "verify"]).output
    assert f"older library, and listed by the next command that writes: {SAMPLES}, {ROUTER_CHART}" in output
    assert "PLANTED" in (page := written(library)) and "The router on unseen" in page
    library = Library.open(library.path)
    assert {SAMPLES, ROUTER_CHART} <= library.manifest.records.keys() and library.verify() == []
    with library.writing():
        assert [row["prompt"] for row in read_records(library, SAMPLES)] == ["PLANTED"]


@pytest.mark.parametrize("file", [PAGE, ROUNDS_CHART, FORGETTING_CHART])
@pytest.mark.parametrize("listed", [False, True])
def test_a_folder_in_place_of_a_part_is_moved_aside(tmp_path: Path, file: str, listed: bool) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    with library.writing():
        library.write_file(
            FORGETTING, json.dumps([{"after": "chat", "own_stacks": {"chat": 1.5}, "all_stacks": {}}]).encode()
        )
    if listed:
        written(library)
        (library.path / file).unlink()
    (library.path / file).mkdir(parents=True)
    (library.path / file / "mine").write_text("mine")
    assert "<td>chat" in written(library) and (library.path / file).is_file()
    (aside,) = library.leftovers()
    assert (aside / "mine").read_text() == "mine" and Library.open(library.path).verify() == []


def test_a_chart_that_cannot_be_drawn_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    assert ROUNDS_CHART in library.manifest.records or "base64" in written(library)
    manifest = json.loads((library.path / "manifest.json").read_text())
    manifest["domains"][0]["base_loss"] = -1e308
    manifest["domains"][0]["rounds"][0].update(loss_before=-1.7e308, loss_after=1.7e308)
    (library.path / "manifest.json").write_text(json.dumps(manifest))
    assert "base64" not in written(library), "an older chart would show other losses"
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{ROUNDS_CHART} cannot be drawn" in warning and not [w for w in recwarn if w.category is RuntimeWarning]
    result = CliRunner().invoke(cli.library, [str(library.path), "list"])
    assert "-1e+308 -> 1.7e+308" in result.output


def test_thousands_of_rounds_and_domains_are_drawn(tmp_path: Path) -> None:
    library = new_library(tmp_path / "library", tiny_base(), ["chat"])
    one = library.manifest.domains[0]
    many = [one.rounds[0].model_copy(update={"round": number}) for number in range(1, 2001)]
    others = [one.model_copy(update={"name": f"d{number}", "validation": None}) for number in range(200)]
    for domains in ([one.model_copy(update={"rounds": many})], [*others, one]):
        library.manifest.domains = domains
        figure = _rounds(library)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        assert len(axes.get_xticks()) <= 15 and all(tick == int(tick) for tick in axes.get_xticks())
        assert axes.get_legend_handles_labels()[1][-1] == "chat" and len(axes.get_legend().get_texts()) <= 40


def test_a_library_without_records_has_a_page_too(tmp_path: Path) -> None:
    page = written(new_library(tmp_path / "library", tiny_base(), []))
    assert "0 domains, 0 frozen stacks" in page and "base64" not in page
