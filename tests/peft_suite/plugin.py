"""Pytest plugin for PEFT's suite: selects the tests that our rows reach, and says how each of them ended.

The environment variable PEFT_SUITE_RESULTS names the file that gets one JSON object a test.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_suite import rows
from peft_suite.declared import kind_of

# What is raised when a file of the Hub is not in the local cache.
NO_FILE = re.compile(
    r"LocalEntryNotFound|OfflineModeIsEnabled|cannot find the requested files in the local cache|"
    r"(?i:couldn't (connect|find)|offline mode|not a local folder and is not a valid model identifier|Can't load)"
)


def pytest_configure() -> None:
    rows.install()
    import tests.testing_utils as helpers

    @contextmanager
    def offline(model_id: str) -> Iterator[None]:
        yield

    helpers.hub_online_once = offline
    helpers.load_dataset_english_quotes = _quotes


def _quotes() -> Any:
    from datasets import Dataset, DatasetDict

    text = [f"Number {number} says that {number} and {number + 1} differ." for number in range(64)]
    columns = {"quote": text, "author": ["nobody"] * 64, "tags": [["numbers"]] * 64}
    return DatasetDict(train=Dataset.from_dict(columns))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rows.collecting = False
    kept = [item for item in items if isinstance(item, pytest.Function) and _applies(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _applies(item: pytest.Function) -> bool:
    if any(rows.is_ours(value) for value in _parameters(item)):
        return True
    if item.path.name not in rows.STAND_IN:
        return False
    # Helpers and fixtures of a class may create the config for its tests.
    around = [] if item.cls is None else [part for name, part in vars(item.cls).items() if not name.startswith("test")]
    parts = [item.function, *(part for part in around if inspect.isfunction(part) or hasattr(part, "__wrapped__"))]
    return any("LoraConfig" in _source(part) for part in parts)


def _source(part: Any) -> str:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return ""


def _parameters(item: pytest.Function) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    item.stash[CREATED] = rows.LoraStandIn.created
    for value in _parameters(item):
        if isinstance(value, rows.LoraStandIn) and value.foreign:
            rows.skip_foreign(value)


CREATED = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        kind, why = _ended(item, call, report)
        entry = {"test": f"{item.path.name}::{item.nodeid.partition('::')[2]}", "kind": kind, "why": why}
        with Path(os.environ["PEFT_SUITE_RESULTS"]).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return report


def _ended(item: pytest.Function, call: pytest.CallInfo[None], report: pytest.TestReport) -> tuple[str, str]:
    ours = any(rows.is_ours(value) for value in _parameters(item))
    reached = ours or rows.LoraStandIn.created > item.stash.get(CREATED, 0)
    if report.passed:
        return ("passed" if reached else "not ours"), ""
    assert call.excinfo is not None
    messages = list(_messages(call.excinfo.value))
    if report.skipped:
        return ("skipped" if reached else "not ours"), messages[0]
    if any(NO_FILE.search(message) for message in messages):
        return "no file", messages[0]
    kind, why = kind_of(f"{item.path.name}::{item.nodeid.partition('::')[2]}", messages)
    return ("not reached", why) if kind == "failed" and not reached else (kind, why)


def _messages(error: BaseException | None) -> Iterator[str]:
    """Of an exception and of those that led to it."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
