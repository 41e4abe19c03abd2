"""The one reader of files from strangers: what it refuses, and that nothing goes around it."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import save, save_file

from axolotl_brainstacks.guarded import (
    MAX_VALUES,
    folder_problem,
    load_tensors,
    open_regular,
    parse_json,
    parse_tensors,
    printable,
    read,
    read_json,
)

PACKAGE = REPO / "axolotl_brainstacks"
# They read what this machine wrote itself, or the base model's files: checkpoints in `output_dir`, pipes of a sandbox.
OWN_FILES = {
    "guarded.py",
    "library/checkpoint_files.py",
    "curriculum/checkpoints.py",
    "curriculum/guard.py",
    "rewards/sandbox.py",
    "rewards/sandboxed.py",
}
READS = re.compile(
    r"(?<![\w.])(?<!def )open\(|(?<!Library)(?<!os)\.open\(|read_bytes\(\)|read_text\(|json\.loads?\(|load_file\(|safe_open"
    r"|torch\.load\("
)
# What was just made by us is no file.
OURS = re.compile(r"json\.loads\(manifest\.model_dump_json\(\)\)")


def test_nothing_else_reads_a_librarys_files() -> None:
    found = {
        f"{name}:{number}"
        for path in PACKAGE.rglob("*.py")
        if (name := path.relative_to(PACKAGE).as_posix()) not in OWN_FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if READS.search(OURS.sub("", line))
    }
    assert not found
    assert READS.search((PACKAGE / "guarded.py").read_text()), "the pattern finds what it is for"


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a fifo", "device"])
def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path = Path("/dev/zero")
        case _:
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to(tmp_path / "fifo")
    for action in (open_regular, read, read_json, load_tensors):
        with pytest.raises(ValueError, match=rf"{path} is no regular file: remove"):
            action(path)


def test_a_link_to_a_file_is_followed_and_one_to_a_folder_is_named(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "file").write_bytes(b"here")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").symlink_to(real / "file")
    (tmp_path / "root/folder").symlink_to(real)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert read(tmp_path / "root/file") == b"here"
    for root in (tmp_path / "root", tmp_path / "link"):
        assert folder_problem(root, "file") is None and folder_problem(root, "missing/file") is None
        problem = folder_problem(root, "folder/file")
        assert problem and str(root / "folder") in problem and "symbolic link" in problem
        assert "no folder" in (folder_problem(tmp_path / "real", "file/x") or "")


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read(path, 10) == b"x" * 10
    with pytest.raises(ValueError, match=rf"{path} is larger than the 9 bytes"):
        read(path, 9)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(ValueError, match="is larger than"):
        read(path)


def test_a_file_of_the_kernel_that_counts_as_empty_is_not_read() -> None:
    with pytest.raises(ValueError, match=r"/proc/self/status does not have the 0 bytes that it says.*put a real file"):
        read(Path("/proc/self/status"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested deeper than 32"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite"),
        ("[1e999]", "1e999 is no finite"),
        (f"[{'9' * 5000}]", "integer string conversion"),
        ("", "JSONDecodeError"),
        ("[\x1b]", "JSONDecodeError"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        (b'["\xed\xa0\x80"]', "UnicodeDecodeError"),
        (f"[{'[],' * MAX_VALUES}[]]", f"more than {MAX_VALUES} values"),
        (
            f"{{{','.join(f'{chr(34)}{key}{chr(34)}:0' for key in [*range(200_000), 199_999])}}}",
            "the key '199999' is there",
        ),
        ('["\\ud800"]', "UnicodeEncodeError"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.timeout(60)
def test_json_that_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert str(caught.value).isprintable()


def test_json_that_is_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": []}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(r'["\u00e9\ud83d\ude00"]') == ["é😀"]
    nested = parse_json("[" * 32 + "]" * 32)
    assert json.dumps(nested) == "[" * 32 + "]" * 32
    assert parse_json("[NaN, Infinity]", non_finite=True)[1] == float("inf")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.json is damaged .*restore"):
        read_json(tmp_path / "x.json")


def test_text_for_a_terminal() -> None:
    hostile = "\x1b[2Ja\rb\nc\u202ed\x9be\ud800f\u2028g\x07"
    shown = printable(hostile)
    assert shown.isprintable() and shown == r"\x1b[2Ja\rb\nc\u202ed\x9be\ud800f\u2028g\x07"
    assert printable("Größe 数学 [/b]") == "Größe 数学 [/b]"


@pytest.mark.parametrize("header", [b"", b"\x01", (2**63).to_bytes(8, "little"), (10**6).to_bytes(8, "little") + b"{}"])
def test_a_safetensors_header_is_bounded(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    with pytest.raises(ValueError, match=rf"{path} is damaged \(no safetensors header\): restore"):
        load_tensors(path)
    with pytest.raises(ValueError, match="rows is damaged"):
        parse_tensors(header, "rows")


def test_whole_tensors_come_back_and_damaged_ones_are_named(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["a"], tensors["a"])
    data = bytearray(save(tensors))
    assert torch.equal(parse_tensors(bytes(data), "rows")["a"], tensors["a"])
    data[20] ^= 0xFF
    with pytest.raises(ValueError, match=r"rows is damaged .*restore"):
        parse_tensors(bytes(data), "rows")
