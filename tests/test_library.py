import copy
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from axolotl_brainstacks import cli
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.manifest import BaseModelInfo, DomainEntry, Manifest, RoundRecord, RouterEntry

CONFIG = {"peft_type": "BRAINSTACKS", "r": 4, "target_modules": {"v_proj", "q_proj"}}
KEY = "base_model.model.layers.0.q_proj.brainstacks_"


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start in a few milliseconds with torch already imported, and share no lock with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["axolotl_brainstacks.library", "click.testing", "pytest"])
    return context


def some_tensors(rows: int = 8) -> dict[str, Tensor]:
    bank = torch.randn(2 * rows, 16)  # slices of one storage, as a fused bank gives them
    return {KEY + "A.weight": bank[:rows], KEY + "B.weight": bank[rows:].T}


def a_round(number: int = 1, kept: bool = True, loss: float = 1.5) -> RoundRecord:
    return RoundRecord(
        round=number, kept=kept, loss_before=2.5, loss_after=loss, steps=7, stop_reason="max_steps", metrics={"b": 1.0}
    )


def a_domain(name: str, context: list[str] | None = None) -> DomainEntry:
    return DomainEntry(name=name, base_loss=2.5, context=context or [])


def new_library(path: Path, *domains: str) -> Library:
    base = BaseModelInfo(name="tiny", config_hash="0" * 64, fingerprint=torch.randn(32).tolist())
    library = Library.create(path, base)
    with library.writing():
        for name in domains:
            library.add_domain(a_domain(name), f"rows of {name}".encode())
            library.add_stack(name, 1, CONFIG, some_tensors(), a_round())
    return library


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return new_library(tmp_path / "library", "chat", "code")


def weights(library: Library, name: str) -> Path:
    return library.stack_path(name) / "adapter_model.safetensors"


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
        library.write_nullspace("code", {"q_proj": torch.randn(16, 2)}, columns=2, energy=0.5, capacity_left=0.9)
        library.write_nullspace("code", basis, columns=3, energy=0.75, capacity_left=0.8125)
    domain = Library.open(library.path).manifest.domain("code")
    assert domain.done and domain.context == ["s001_chat", "s002_code"] and domain.last_loss == 1.5
    assert domain.rounds[1].loss_after != domain.rounds[1].loss_after, "a NaN loss survives the JSON"
    assert domain.nullspace and (domain.nullspace.columns, domain.nullspace.capacity_left) == (3, 0.8125)
    assert torch.equal(library.nullspace("code")["q_proj"], basis["q_proj"])
    assert len(list((library.path / "nullspace").iterdir())) == 1, "the replaced basis is gone"
    with pytest.raises(ValueError, match=r"'chat' .* without a null space"):
        library.nullspace("chat")


def test_validation_rows_come_and_go_with_their_domain(library: Library) -> None:
    assert library.validation("chat") == b"rows of chat" and library.validation("code") == b"rows of code"
    with library.writing():
        library.remove_domain("chat")
        library.add_domain(a_domain("law"))
    assert [path.name for path in (library.path / "validation").iterdir()] == ["code.safetensors"]
    with pytest.raises(ValueError, match=r"'law' .* has no validation rows"):
        library.validation("law")


def test_the_root_is_a_peft_folder(library: Library) -> None:
    from safetensors.torch import load_file

    with library.writing():
        library.write_root_config(CONFIG)
    assert json.loads((library.path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert load_file(library.path / "adapter_model.safetensors") == {}
    assert library.verify() == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damage_to_the_root_is_found_and_mended(library: Library, file: str) -> None:
    assert library.manifest.root == {}  # as in a library of an older version
    with library.writing():
        library.write_root_config(CONFIG)
    path = library.path / file
    whole = path.read_bytes()
    for damage, word in ((truncate, "truncated"), (alter_a_byte, "altered"), (Path.unlink, "missing")):
        damage(path)
        (problem,) = library.verify()
        assert f"{path} is {word}" in problem and library.damage() == []
        with library.writing():
            library.write_root_config(CONFIG)
        assert library.verify() == [] and path.read_bytes() == whole
    manifest = (library.path / "manifest.json").stat().st_mtime_ns
    with library.writing():
        library.write_root_config(CONFIG)
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


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def alter_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "word"), [(truncate, "is truncated"), (alter_a_byte, "is altered"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "nullspace", "validation"])
def test_damaged_files_are_named(library: Library, damage: Callable[[Path], None], word: str, file: str) -> None:
    with library.writing():
        entry = library.write_nullspace("code", {"q": torch.randn(4, 2)}, 2, 0.5, 0.5)
    others = {"nullspace": entry.file, "validation": "validation/code.safetensors"}
    path = library.path / others.get(file, f"stacks/s002_code/{file}")
    damage(path)
    problems = library.verify()
    assert len(problems) == 1 and str(path) in problems[0] and word in problems[0]
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {word}.*restore"):
        match file:
            case "nullspace":
                library.nullspace("code")
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


def test_leftovers_of_a_killed_writer_are_swept_and_files_of_the_user_are_not(library: Library) -> None:
    stray = library.path / "stacks" / "s009_ghost" / "adapter_model.safetensors"
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


def edited(library: Library, change: Callable[[dict], object]) -> None:
    path = library.path / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), r"schema_version 2, and this .* reads 1: .*pip install -U"),
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


def test_no_library_and_malformed_json(library: Library, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is not a library"):
        Library.open(tmp_path)
    truncate(library.path / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json is not the manifest of a library \(JSONDecodeError"):
        Library.open(library.path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_state(small_disk: Path) -> None:
    library = new_library(small_disk / "library", "chat")
    page = os.sysconf("SC_PAGESIZE")
    ballast = small_disk / "ballast"
    before = library.manifest
    failed_at = set()
    with library.writing():
        for free_pages in range(100):
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - free_pages * page))
            try:
                library.add_stack("chat", 2, CONFIG, some_tensors(rows=2 * page // 64), a_round(2))
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and re.search(r"disk full, \d+ bytes are needed", str(error))
                failed_at.add(Path(error.filename).name)
            assert library.manifest == Library.open(library.path).manifest == before
            assert library.verify() == [] and not (library.path / ".tmp").exists()
    assert failed_at == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert [s.name for s in library.manifest.stacks] == ["s001_chat", "s002_chat"] and library.verify() == []


# Writers in other processes


def hold(path: Path, ready: Connection) -> None:
    with Library.open(path).writing():
        if os.fork() == 0:  # as a data loader's worker: it outlives the writer and must not keep the lock
            ready.send(os.getpid())  # from here, as the lock is let go after the fork, in the worker
        time.sleep(60)


def test_one_writer_at_a_time(library: Library, processes: multiprocessing.context.ForkServerContext) -> None:
    receive, send = processes.Pipe(duplex=False)
    writer = processes.Process(target=hold, args=(library.path, send))
    writer.start()
    assert receive.poll(60)
    worker = receive.recv()
    try:
        with pytest.raises(ValueError, match=rf"another process \(pid {writer.pid} on .*\): wait"), library.writing():
            pass
        assert Library.open(library.path).verify() == [], "readers need no lock"
        writer.kill()
        writer.join()
        with library.writing():
            library.add_domain(a_domain("law"))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_two_libraries_of_one_process_are_one_writer(library: Library) -> None:
    other = Library.open(library.path)
    with library.writing():
        with other.writing():
            other.add_domain(a_domain("law"))
        library.add_domain(a_domain("math"))
    assert [d.name for d in Library.open(library.path).manifest.domains] == ["chat", "code", "law", "math"]
    with pytest.raises(AssertionError):
        other.add_domain(a_domain("medical"))


def every_change(library: Library) -> Iterator[None]:
    """Each kind of change once; the manifest depends on nothing random."""
    tensors = {KEY + "B.weight": torch.arange(1.0, 4000.0)}
    yield library.add_domain(a_domain("law", ["s001_chat"]), b"rows of law")
    yield library.record_round("law", a_round(1, kept=False))
    yield library.write_nullspace("code", tensors, 3, 0.5, 0.5) and None
    yield library.add_stack("law", 2, CONFIG, tensors, a_round(2)) and None
    record = library.write_file("router/router.safetensors", b"new")
    yield
    yield library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["law"]))
    yield library.remove_domain("code") and None


def change_and_die(path: Path, moment: int) -> None:
    """Be killed just before the given operation on the library's files; the interpreter announces each one."""
    library = Library.open(path)
    moments = iter(range(moment))

    def count(event: str, args: tuple) -> None:
        changes = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(path) in str(args[0])
        if changes and next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with library.writing():
        for _ in every_change(library):
            pass


def test_a_kill_before_any_file_operation(
    library: Library, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    with library.writing():
        library.write_nullspace("code", {"v": torch.randn(2000)}, 1, 0.5, 0.5)
        record = library.write_file("router/router.safetensors", b"old")
        library.set_router(RouterEntry(files={"router/router.safetensors": record}, domains=["chat", "code"]))
    shutil.copytree(library.path, tmp_path / "whole")
    states = [library.manifest]
    with (whole := Library.open(tmp_path / "whole")).writing():
        for _ in every_change(whole):
            states.append(whole.manifest)
    seen: list[Manifest] = []
    for moment in range(0, 1000):
        victim = tmp_path / f"killed{moment}"
        shutil.copytree(library.path, victim)
        process = processes.Process(target=change_and_die, args=(victim, moment))
        process.start()
        process.join()
        survivor = Library.open(victim)
        assert all("unknown" in problem for problem in survivor.verify())
        with survivor.writing():
            assert survivor.verify() == [] and not (victim / ".tmp").exists()
        if survivor.manifest not in seen:
            seen.append(survivor.manifest)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert seen == states and moment > 50


def add_for_ever(path: Path, progress: Semaphore) -> None:
    library = Library.open(path)
    with library.writing():
        while True:
            progress.release()
            library.add_stack("chat", 1, CONFIG, some_tensors(rows=4096), a_round())


def test_kills_at_random_moments(library: Library, processes: multiprocessing.context.ForkServerContext) -> None:
    stacks = [s.name for s in library.manifest.stacks]
    for _ in range(20):
        progress = processes.Semaphore(0)
        process = processes.Process(target=add_for_ever, args=(library.path, progress))
        process.start()
        assert progress.acquire(timeout=60) and progress.acquire(timeout=60), "one stack is in"
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        library = Library.open(library.path)
        with library.writing():
            assert library.verify() == []
        names = [s.name for s in library.manifest.stacks]
        assert names[: len(stacks)] == stacks, "what was there stays"
        stacks = names
    assert len(stacks) >= 22, "every writer got something done"


# The base model


def tiny_model(**changes: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | {"vocab_size": 2048} | changes)))


def test_one_model_in_every_dtype_is_the_same_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny_model()
    base = BaseModelInfo.of(model, "tiny", "main")
    for dtype in (torch.bfloat16, torch.float16):
        base.check(BaseModelInfo.of(copy.deepcopy(model).to(dtype), "half"))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    base.check(BaseModelInfo.of(reloaded, "reloaded"))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    assert any(type(module).__name__ == "Linear4bit" for module in quantised.modules())
    base.check(BaseModelInfo.of(quantised, "quantised"))
    model.config.max_position_embeddings *= 2
    model.config.eos_token_id = 5
    model.config.use_cache = False
    model.resize_token_embeddings(2048 + 64)
    base.check(BaseModelInfo.of(model, "resized"))


def test_other_models_are_refused() -> None:
    model = tiny_model()
    base = BaseModelInfo.of(model, "org/right", "v1")
    for changes in ({"num_hidden_layers": 2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        with pytest.raises(ValueError, match="org/right@v1, but org/wrong has another architecture"):
            base.check(BaseModelInfo.of(tiny_model(**changes), "org/wrong"))
    with pytest.raises(ValueError, match="org/right@v1, but org/wrong has the same architecture with other weights"):
        base.check(BaseModelInfo.of(tiny_model(), "org/wrong"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.05)
    with pytest.raises(ValueError, match="other weights"):
        base.check(BaseModelInfo.of(model, "tuned"))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="other weights"):
        base.check(BaseModelInfo.of(model, "broken"))


# The command line


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
    chat, code = (next(line for line in lines if f" {name}" in line and "->" in line) for name in ("chat", "code"))
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
