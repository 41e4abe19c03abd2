"""Finds entries of datasets whose local files are missing, before any data or model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_brainstacks.args import DomainArgs
from axolotl_brainstacks.curriculum.overlay import overlaid, overlaid_rl
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.rl_checks import rl_title

LOG = get_logger(__name__)

_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow")
# With one of these as `path`, `data_files` names files of this machine; with a name on the Hub, files in its repository.
_READERS = ("json", "csv", "parquet", "text", "arrow")


def check_data_files(plan: Plan, needed: Collection[str]) -> None:
    """Check that the local files and folders that the plan's datasets name are there. Names on the Hub and URLs pass.

    Args:
        needed: the domains whose data the run reads; for others a missing file is only a warning.

    Raises:
        ValueError: if any is missing; it names them all.
    """
    missing = list(_missing("brainstacks.router.mixed_datasets", "", plan.block.router.mixed_datasets))
    for domain in plan.block.curriculum:
        found = list(_missing_of(plan.raw, domain))
        if domain.name in needed:
            missing += found
        elif found:
            LOG.warning("%s; this run does without the data of domain %s", "; ".join(found), domain.name)
    if missing:
        raise ValueError(f"{'; '.join(missing)}: correct the path; a relative one starts at {Path.cwd()}")


def _missing_of(raw: dict[str, Any], domain: DomainArgs) -> Iterator[str]:
    own, where = overlaid(raw, domain.overlay), f" of domain `{domain.name}`"
    for key in ("datasets", "test_datasets"):
        yield from _missing(key, where, own.get(key))
    yield from _missing("brainstacks.router_datasets", where, domain.brainstacks.router_datasets)
    for number, entry in enumerate(domain.rl_rounds):
        keys = overlaid_rl(own, entry.overlay)
        for key in ("datasets", "test_datasets"):
            yield from _missing(key, f" of {rl_title(domain.name, number)}", keys.get(key))


def _missing(key: str, where: str, entries: list[dict[str, Any]] | None) -> Iterator[str]:
    """A sentence for each entry of the list `key` that names a local file which is not there."""
    for entry in entries or []:
        path, files = str(entry.get("path")), entry.get("data_files") or []
        if _looks_local(path) and not Path(path).exists():
            yield f"`{key}`{where}: there is no {path}"
        here = path in _READERS or Path(path).is_dir()
        for file in map(str, [files] if isinstance(files, str) else files):
            if (here or Path(file).is_absolute()) and _looks_local(file) and not _matches(file):
                yield f"`data_files` in `{key}`{where}: there is no {file}"


def _looks_local(path: str) -> bool:
    return "://" not in path and (path.startswith(("/", "./", "../", "~")) or path.endswith(_ENDINGS))


def _matches(pattern: str) -> bool:
    return bool(glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
