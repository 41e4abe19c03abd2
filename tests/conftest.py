"""What holds for every test: its seed, its tier, an end to the processes that it started. Fixtures of many tests.

Model folders and the demo's data are made once, into the ignored ``.demo`` folder.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "example_configs"))
os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_TEE_STDOUT": "0",  # its tee around stdout deadlocks with pytest's capture
    "AXOLOTL_DATASET_NUM_PROC": "0",  # else every small file is saved by a fresh process, in seconds
}

from prepare_demo import prepare_data, prepare_model  # noqa: E402
from support.models import tiny_llama  # noqa: E402
from support.processes import kill_children  # noqa: E402
from support.seeds import VARIABLE, seed_everything  # noqa: E402
from support.tiers import tier  # noqa: E402

DEMO = REPO / ".demo"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by these markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            item.add_marker(tier(item))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    """A fixture of a module is the same whichever of its tests is the first to ask for it."""
    # `param_index` is of fixtures with `params`, or those that a test parametrizes.
    parameter = getattr(request, "param_index", 0)
    seed_everything(f"{request.node.nodeid} {fixturedef.argname} {parameter}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_everything(item.nodeid)
    # An interrupt inside the exit of torch.no_grad() leaves gradients off in the thread, and tests of interrupts hit it.
    torch.set_grad_enabled(True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("Random numbers", f"{VARIABLE}={os.environ[VARIABLE]}"))
    return report


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    kill_children()


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
