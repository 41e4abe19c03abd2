"""Fixtures of many tests: model folders and the demo's data, made once into the ignored ``.demo`` folder; a small disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "example_configs"))
os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_TEE_STDOUT": "0",  # its tee around stdout deadlocks with pytest's capture
    "AXOLOTL_DATASET_NUM_PROC": "0",  # else every small file is saved by a fresh process, in seconds
}

from models import tiny_llama  # noqa: E402
from prepare_demo import prepare_data, prepare_model  # noqa: E402

DEMO = REPO / ".demo"


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with tokenizer and chat template; read-only for tests."""
    return tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return prepare_model("smollm2", DEMO)


@pytest.fixture(scope="session")
def gemma_dir() -> Path:
    return prepare_model("gemma3-270m", DEMO)


@pytest.fixture(scope="session")
def demo_data_dir() -> Path:
    return prepare_data(DEMO)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB that a test can fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)
