import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from support.library_files import edited
from support.random_library import CONFIG, KEY, a_domain, a_round, alter_a_byte, some_tensors, truncate, weights
from support.random_library import library as library

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry

# What goes in comes out


def test_a_stack_comes_back_bit_for_bit(library: Library) -> None:
    tensors = {**some_tensors(), KEY + "noise.weight": torch.randn(3, 5).to(torch.bfloat16)}
    with library.writing():
        entry = library.add_stack("code", 2, CONFIG, tensors, a_round(2, loss=1.25))
    again = Library.open(library.path)
    assert entry.name == "s003_code" and again.manifest == library.manifest
    loaded = again.stack_tensors("s003_code")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[k].dtype == t.dtype and torch.equal(loaded[k], t) for k, t in tensors.items())
    assert again.stack_config("s003_code") == CONFIG | {"target_modules": ["q_proj", "v_proj"]}
    assert [r.stack for r in again.manifest.domain("code").rounds] == ["s002_code", "s003_code"]
    assert again.manifest.domain("code").last_loss == 1.25
    assert again.verify() == []


def test_domains_rounds_and_null_space_are_recorded(library: Library) -> None:
    basis = {"q_proj": torch.randn(16, 3)}
    with library.writing():
        library.record_round("code", a_round(2, kept=False, loss=float("nan")))
        library.update_domain("code", done=True, context=["s001_chat", "s002_code"])
        library.write_protection("code", {"q_proj": torch.randn(16, 2)}, 0.5, 0.9, ["chat"])
        library.write_protection("code", basis, 0.75, 0.8125, ["chat"])
    domain = Library.open(library.path).manifest.domain("code")
    assert domain.done and domain.context == ["s001_chat", "s002_code"] and domain.last_loss == 1.5
    assert domain.rounds[1].loss_after != domain.rounds[1].loss_after, "a NaN loss survives the JSON"
    assert domain.protection and (domain.protection.columns, domain.protection.capacity_left) == (3, 0.8125)
    assert domain.protection.energy == 0.75 and domain.protection.beyond == ["chat"]
    assert torch.equal(library.protection("code")["q_proj"], basis["q_proj"])
    assert len(list((library.path / "nullspace").iterdir())) == 1, "the replaced basis is gone"
    with pytest.raises(ValueError, match=r"'chat' .* no protection yet"):
        library.protection("chat")


def test_validation_rows_come_and_go_with_their_domain(library: Library) -> None:
    assert library.validation("chat") == b"rows of chat" and library.validation("code") == b"rows of code"
    with library.writing():
        library.remove_domain("chat")
        library.add_domain(a_domain("law"))
    assert [path.name for path in (library.path / "validation").iterdir()] == ["code.safetensors"]
    with pytest.raises(ValueError, match=r"'law' .* has no validation examples"):
        library.validation("law")


def test_the_root_is_a_peft_folder(library: Library) -> None:
    from safetensors.torch import load_file

    with library.writing():
        library.write_root_config(CONFIG | {"library": "."})
    assert json.loads((library.path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert load_file(library.path / "adapter_model.safetensors") == {}
    assert library.verify() == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damage_to_the_root_is_found_and_mended(library: Library, file: str) -> None:
    assert library.manifest.root == {}  # as in a library of an older version
    with library.writing():
        library.write_root_config(CONFIG | {"library": "."})
    path = library.path / file
    whole = path.read_bytes()
    for damage, word in ((truncate, "truncated"), (alter_a_byte, "altered"), (Path.unlink, "missing")):
        damage(path)
        (problem,) = library.verify()
        assert f"{path} is {word}" in problem and library.damage() == []
        with library.writing():
            library.write_root_config(CONFIG | {"library": "."})
        assert library.verify() == [] and path.read_bytes() == whole
    manifest = (library.path / "manifest.json").stat().st_mtime_ns
    with library.writing():
        library.write_root_config(CONFIG | {"library": "."})
    assert (library.path / "manifest.json").stat().st_mtime_ns == manifest
    assert set(Library.open(library.path).manifest.root) == {"adapter_model.safetensors", "adapter_config.json"}


def test_removing_a_domain(library: Library) -> None:
    with library.writing():
        library.update_domain("code", context=["s001_chat", "s002_code"])
        files = {"router/router.safetensors": library.write_file("router/router.safetensors", b"weights")}
        library.set_router(RouterEntry(files=files, domains=["chat", "code"]))
        code = library.stack_tensors("s002_code")
        assert library.remove_domain("chat") == ["code"]
        assert library.manifest.router and library.manifest.router.stale
        assert not (library.path / "stacks" / "s001_chat").exists() and library.verify() == []
        assert all(torch.equal(library.stack_tensors("s002_code")[k], t) for k, t in code.items())
        assert library.remove_domain("code") == [] and library.manifest.stacks == []
        library.add_domain(a_domain("code"))
        assert library.add_stack("code", 1, CONFIG, some_tensors(), a_round()).name == "s003_code", "no name twice"


def test_what_the_user_put_into_a_stack_survives_its_removal(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = library.path / "stacks" / "s001_chat"
    (stack / "my_notes.txt").write_text("mine")
    deep = stack / "more"
    for _ in range(1500):  # deeper than Python's recursion goes
        deep.mkdir()
        monkeypatch.chdir(deep)
        deep = Path("d")
    monkeypatch.undo()
    with library.writing():
        library.remove_domain("chat")
    assert not stack.exists() and library.verify() == []
    moved = {path.name.partition("-")[2]: path for path in (library.path / ".leftovers").iterdir()}
    assert moved["my_notes.txt"].read_text() == "mine" and (moved["more"] / "d" / "d").is_dir()
    subprocess.run(["rm", "-r", moved["more"]], check=True)  # pytest's own cleaning would not get through it


def remove_as_another_user(path: Path) -> int:
    """Remove domain `chat` in a process that is not root, for whom modes count; its exit status."""
    for entry in (path, *path.rglob("*")):
        os.chown(entry, 65534, 65534)
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            library = Library.open(path)
            with library.writing():
                library.remove_domain("chat")
            os._exit(0 if library.verify() == [] else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_that_came_read_only_out_of_an_archive_is_removed(library: Library) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "library"
        shutil.copytree(library.path, path)
        (path / ".tmp" / "s009_old").mkdir(parents=True)
        (path / ".tmp" / "s009_old" / "file").touch()
        for entry in (path / "stacks" / "s001_chat", path / ".tmp" / "s009_old"):
            entry.chmod(0o555)
        assert remove_as_another_user(path) == 0
        assert not (path / "stacks" / "s001_chat").exists() and not (path / ".tmp").exists()


def test_a_broken_record_is_set_aside_beside_an_earlier_one(library: Library) -> None:
    names = []
    with library.writing():
        for content in (b"one", b"two"):
            library.write_file("report/samples.jsonl", content)
            names.append(library.set_aside("report/samples.jsonl"))
    assert [path.read_bytes() for path in names] == [b"one", b"two"]


def test_replacing_a_router_file_drops_the_router(library: Library) -> None:
    with library.writing():
        record = library.write_file("router/router.safetensors", b"old")
        library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["chat"]))
        library.write_file("report/report.html", b"page")
        assert library.manifest.router
        library.write_file("router/router.safetensors", b"new")
        assert library.manifest.router is None and library.verify() == []


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stacks_are_refused(library: Library, value: float) -> None:
    tensors = some_tensors()
    tensors[KEY + "A.weight"][random.randrange(8), random.randrange(16)] = value
    before = (library.path / "manifest.json").read_bytes()
    with library.writing(), pytest.raises(ValueError, match=r"NaN or infinite values in .*brainstacks_A.weight"):
        library.add_stack("code", 2, CONFIG, tensors, a_round(2))
    assert (library.path / "manifest.json").read_bytes() == before and library.verify() == []


def test_dead_stacks_are_refused(library: Library) -> None:
    with library.writing():
        zero_a = some_tensors()
        zero_a[KEY + "A.weight"].zero_()
        library.add_stack("code", 2, CONFIG, zero_a, a_round(2))
        dead = some_tensors()
        dead[KEY + "B.weight"].zero_()
        with pytest.raises(ValueError, match=r"dead stack: .*brainstacks_B.weight of domain 'code'"):
            library.add_stack("code", 3, CONFIG, dead, a_round(3))
    assert len(library.manifest.stacks) == 3 and library.verify() == []


def test_a_domain_is_added_once_and_unknown_ones_are_named(library: Library) -> None:
    with library.writing():
        with pytest.raises(ValueError, match=r"'chat' is in .* already"):
            library.add_domain(a_domain("chat"), b"other rows")
        with pytest.raises(ValueError, match="'law' is not in the library, which has chat, code"):
            library.add_stack("law", 1, CONFIG, some_tensors(), a_round())
    assert library.verify() == [] and [d.name for d in library.manifest.domains] == ["chat", "code"]
    for name in ("Chat", "1chat", "../x", "", "a" * 33):
        with pytest.raises(ValueError, match="should match pattern"):
            a_domain(name)


def test_changes_need_the_lock(library: Library) -> None:
    with pytest.raises(AssertionError, match="writing"):
        library.add_domain(a_domain("law"))
    with pytest.raises(AssertionError, match="writing"):
        library.remove_domain("chat")


def test_create_refuses_libraries_and_foreign_folders(library: Library, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a library already"):
        Library.create(library.path, library.manifest.base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stacks").mkdir()
    with pytest.raises(ValueError, match="no library and not empty"):
        Library.create(tmp_path / "mine", library.manifest.base)
    assert Library.exists(library.path) and not Library.exists(tmp_path / "mine")


# Damage on disk


@pytest.mark.parametrize(
    ("damage", "word"), [(truncate, "is truncated"), (alter_a_byte, "is altered"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "nullspace", "validation"])
def test_damaged_files_are_named(library: Library, damage: Callable[[Path], None], word: str, file: str) -> None:
    with library.writing():
        entry = library.write_protection("code", {"q": torch.randn(4, 2)}, 0.5, 0.5, [])
    others = {"nullspace": entry.file, "validation": "validation/code.safetensors"}
    path = library.path / others.get(file, f"stacks/s002_code/{file}")
    damage(path)
    problems = library.verify()
    assert len(problems) == 1 and str(path) in problems[0] and word in problems[0]
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {word}.*restore"):
        match file:
            case "nullspace":
                library.protection("code")
            case "validation":
                library.validation("code")
            case "adapter_config.json":
                library.stack_config("s002_code")
            case _:
                library.stack_tensors("s002_code")
    library.stack_tensors("s001_chat")


def test_without_verify_a_truncated_file_is_still_named(library: Library) -> None:
    truncate(weights(library, "s001_chat"))
    with pytest.raises(ValueError, match=r"s001_chat/adapter_model.safetensors is truncated"):
        library.stack_tensors("s001_chat", verify=False)


def test_an_older_manifest_costs_no_stack(library: Library) -> None:
    older = (library.path / "manifest.json").read_bytes()
    with library.writing():
        for number in (2, 3):
            library.add_stack("code", number, CONFIG, some_tensors(), a_round(number))
    newest = (library.path / "manifest.json").read_bytes()
    (library.path / "manifest.json").write_bytes(older)
    stale = Library.open(library.path)
    with pytest.raises(ValueError, match=r"manifest\.json is older than .*s004_code: put the newest"), stale.writing():
        pass
    (library.path / "manifest.json").write_bytes(newest)
    assert Library.open(library.path).verify() == []


def test_a_damaged_router_is_for_verify_and_does_not_stop_training(library: Library) -> None:
    with library.writing():
        record = library.write_file("router/router.safetensors", b"a router")
        library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["chat", "code"]))
    (library.path / "router/router.safetensors").unlink()
    assert library.damage() == []
    (problem,) = library.verify()
    assert "router.safetensors is missing: fit the router again with `axolotl brainstacks-router" in problem


def test_the_type_of_frozen_stacks_is_open_until_there_is_one(library: Library, tmp_path: Path) -> None:
    empty = Library.create(tmp_path / "empty", library.manifest.base)
    empty.manifest.check_frozen_dtype("bfloat16")
    with empty.writing():
        empty.set_frozen_dtype("bfloat16")
    assert Library.open(empty.path).manifest.frozen_dtype == "bfloat16"
    with pytest.raises(ValueError, match="kept as the base model is"):
        library.manifest.check_frozen_dtype("bfloat16")


def test_leftovers_of_a_killed_writer_are_swept_and_files_of_the_user_are_not(library: Library) -> None:
    stray = library.path / "stacks" / "s003_ghost" / "adapter_model.safetensors"
    notes = library.path / "nullspace" / "old.safetensors"
    readme = library.path / "stacks" / "s001_chat" / "README.md"
    readme.write_text("mine")
    for path in (stray, notes, library.path / ".tmp" / "s003_code" / "part"):
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(10))
    ghost, old = library.verify()
    assert ghost.startswith(f"{stray} is unknown") and old.startswith(f"{notes} is unknown")
    with library.writing():
        assert not stray.parent.exists() and not (library.path / ".tmp").exists()
    (problem,) = library.verify()
    assert f"{notes} is unknown to manifest.json: move it out of the library" in problem
    assert library.damage() == []
    notes.unlink()
    assert library.verify() == [] and len(library.manifest.stacks) == 2 and readme.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=3), r"schema_version 3, and this .* reads up to 2: .*pip install -U"),
        (lambda m: m.pop("schema_version"), "not the manifest of a library"),
        (lambda m: m.update(surprise=1), r"damaged at surprise \(Extra inputs"),
        (lambda m: m["stacks"].append(m["stacks"][0]), "stack 's001_chat' is listed twice"),
        (lambda m: m["domains"].append(m["domains"][0]), "domain 'chat' is listed twice"),
        (lambda m: m["domains"].pop(0), "belongs to domain 'chat', which is not listed"),
        (lambda m: m.update(next_stack=2), "next_stack is 2, but stack 's002_code' exists"),
        (lambda m: m["stacks"][0].update(name="../../s001_chat"), "damaged at stacks.0.name"),
        (lambda m: m["stacks"][0]["files"].update({"../../../x": {"sha256": "", "bytes": 0}}), "not a relative path"),
        (
            lambda m: m.update(router={"domains": [], "files": {"/etc/passwd": {"sha256": "", "bytes": 0}}}),
            "/etc/passwd",
        ),
    ],
)
def test_bad_manifests_are_refused(library: Library, change: Callable[[dict], object], message: str) -> None:
    edited(library, change)
    with pytest.raises(ValueError, match=message) as caught:
        Library.open(library.path)
    assert str(library.path / "manifest.json") in str(caught.value)


def test_a_library_of_schema_1_is_read_and_written_as_2(library: Library) -> None:
    """Its null space stays where it is and is whole, but protects nobody: the columns were keyed by who trained."""
    with library.writing():
        entry = library.write_protection("code", {"q": torch.randn(4, 2)}, 0.5, 0.5, [])

    def as_schema_1(data: dict) -> None:
        data["schema_version"] = 1
        for domain in data["domains"]:
            protection = domain.pop("protection")
            if protection:
                del protection["beyond"]
                domain["nullspace"] = protection
            for key in ("constraint", "replaced", "before", "validation_file"):
                del domain[key]

    edited(library, as_schema_1)
    old = Library.open(library.path)
    code = old.manifest.domain("code")
    assert code.nullspace == entry and code.protection is None and old.verify() == []
    with pytest.raises(ValueError, match=r"'code' .* no protection yet"):
        old.protection("code")
    path = library.path / "manifest.json"
    with old.writing():
        assert json.loads(path.read_text())["schema_version"] == 1
        old.update_domain("chat", done=True)
    assert json.loads(path.read_text())["schema_version"] == 2
    assert old.verify() == [] and (library.path / entry.file).is_file()


def test_no_library_and_malformed_json(library: Library, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is not a library"):
        Library.open(tmp_path)
    truncate(library.path / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json is not the manifest of a library \(JSONDecodeError"):
        Library.open(library.path)
