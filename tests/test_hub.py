"""Libraries on the Hub: fetched with the caller's token into the caller's cache, and no more than answers need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.answering import DOMAINS, random_router
from support.hub import Hub, hub_of
from support.routed import new_library, tiny_base

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.library import Library

TOKEN, REPOSITORY = "a-token-of-the-test", "someone/library"

# In a process of its own: the client reads the Hub's address when it is imported.
LOAD = """
import sys, torch
import axolotl_brainstacks
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, repository, subfolder, cache, token = sys.argv[1:]
model = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base), repository, cache_dir=cache, token=token,
    **({"subfolder": subfolder} if subfolder else {}),
)
ids = torch.tensor([[5, 6, 7]])
print([round(float(x), 5) for x in model(ids).logits[0, -1, :4]], [s.name for s in model.base_model.stacks])
model.base_model.route(ids)
print(model.base_model.resident.path)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is in the repository: a library with all kinds of files beside those that answers need."""
    torch.manual_seed(1)
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    library = new_library(tmp_path / "repository", base, DOMAINS[:2])
    random_router(DOMAINS[:2], seed=2).save(library)
    with library.writing():
        library.write_file("report/report.html", b"<html>")
    for extra in ("pytorch_model.bin", "code.py", "stacks/s001_chat/optimizer.pt", "router/discovery.jsonl"):
        (library.path / extra).write_bytes(b"x" * 1000)
    return library.path


def run(hub: Hub, tmp_path: Path, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_private_library_is_fetched_with_the_callers_token_into_the_callers_cache(
    folder: Path, tmp_path: Path
) -> None:
    with hub_of(folder, REPOSITORY, TOKEN) as hub:
        done = run(hub, tmp_path, LOAD, tmp_path / "base", REPOSITORY, "", tmp_path / "cache", TOKEN)
        assert "s001_chat" in done.stdout and str(tmp_path / "cache") in done.stdout
        wanted = {"manifest.json", "adapter_config.json", "adapter_model.safetensors", "router/router_config.json"}
        wanted |= {"router/router.safetensors"}
        wanted |= {f"stacks/{name}/{file}" for name in ("s001_chat", "s002_code")
                   for file in ("adapter_config.json", "adapter_model.safetensors")}  # fmt: skip
        assert hub.sent <= wanted
        (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
        fetched = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        assert fetched == wanted, "files of equal content are fetched once"
        assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_reference_finds_its_library_in_the_repository(folder: Path, tmp_path: Path) -> None:
    """What training leaves in `output_dir`, with the library in it as by default."""
    output = tmp_path / "output"
    BrainstacksConfig.for_library("tiny", "library").save_pretrained(str(output / "run[1]"))
    (output / "run[1]" / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    shutil.copytree(folder, output / "run[1]" / "library")
    with hub_of(output, REPOSITORY, TOKEN) as hub:
        done = run(hub, tmp_path, LOAD, tmp_path / "base", REPOSITORY, "run[1]", tmp_path / "cache", TOKEN)
        assert done.stdout.strip().endswith("run[1]/library")
        assert not [file for file in hub.sent if "report" in file or "validation" in file]


REFUSED = """
import sys
from axolotl_brainstacks.adapter import BrainstacksConfig
repository, cache, token, *subfolders = sys.argv[1:]
for subfolder in subfolders:
    try:
        print(BrainstacksConfig.from_pretrained(repository, subfolder, cache_dir=cache, token=token).library)
    except ValueError as error:
        print("refused:", error)
"""


def test_a_repository_names_no_folder_outside_of_it_and_a_library_itself(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(folder, output / "library")
    for name, library in {"above": "../../other", "absolute": "/etc", "by detour": "in/../../.."}.items():
        BrainstacksConfig.for_library("tiny", library).save_pretrained(str(output / name))
    BrainstacksConfig.for_library("tiny", "../library").save_pretrained(str(output / "beside"))
    shutil.copytree(folder, output / "strange")
    BrainstacksConfig.for_library("tiny", "../library").save_pretrained(str(output / "strange"))
    with hub_of(output, REPOSITORY, TOKEN) as hub:
        done = run(hub, tmp_path, REFUSED, REPOSITORY, tmp_path / "cache", TOKEN,
                   "above", "absolute", "by detour", "strange", "beside")  # fmt: skip
    above, absolute, detour, strange, beside = done.stdout.splitlines()
    for line in (above, absolute, detour):
        assert line.startswith("refused:") and "outside of the repository" in line
    assert "refused:" in strange and "`library` must be '.', but is '../library'" in strange
    assert beside.endswith("/library") and Library.exists(beside)


def test_a_stack_on_the_hub_is_checked_as_one_in_a_folder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    names = ("good", "larger", "pickled")
    for name in names:
        shutil.copytree(folder / "stacks/s001_chat", output / name)
    config = json.loads((output / "larger/adapter_config.json").read_text())
    (output / "larger/adapter_config.json").write_text(json.dumps(config | {"r": 10**6}))
    (output / "pickled/adapter_model.safetensors").rename(output / "pickled/adapter_model.bin")
    with hub_of(output, REPOSITORY, TOKEN) as hub:
        done = run(hub, tmp_path, REFUSED, REPOSITORY, tmp_path / "cache", TOKEN, *names)
    good, larger, pickled = done.stdout.splitlines()
    assert good == "None"
    assert "refused:" in larger and "r 1000000" in larger
    assert "refused:" in pickled and "adapter_model.bin is a pickle" in pickled
