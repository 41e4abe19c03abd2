"""Finds each prompt's best set of domains by measured loss (paper section 1), and keeps every loss measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from tqdm import tqdm

from axolotl_brainstacks.args import DiscoveryArgs
from axolotl_brainstacks.distributed import is_main, on_main
from axolotl_brainstacks.evaluation import Row
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.routing.measure import Meter
from axolotl_brainstacks.routing.search import DomainSet, exhaustive, greedy

FOLDER = "router/discovery"
# A kill loses at most the chunk it falls into; larger chunks leave fewer batches that are not full.
BATCHES_PER_CHUNK = 8


@dataclass
class Found:
    """What discovery learned about one row: mean losses per answer token by set of domains, and the best set."""

    row: Row
    losses: dict[DomainSet, float]
    best: DomainSet


def row_key(row: Row) -> str:
    """Names a row by its tokens."""
    return hashlib.sha256(json.dumps([row.input_ids, row.labels]).encode()).hexdigest()[:16]


class Records:
    """`router/discovery/<source>.jsonl`: first a line with each domain's stacks, then a line per row.

    Losses under sets of domains whose stacks have changed since are left out when the file is read.
    """

    def __init__(self, library: Library, source: str, domains: Sequence[str]) -> None:
        self.library, self.file, self.domains = library, f"{FOLDER}/{source}.jsonl", list(domains)
        self.stacks = {d: [s.name for s in library.manifest.active_stacks if s.domain == d] for d in domains}
        self.rows: dict[str, dict[str, Any]] = {}

    def read(self) -> dict[str, dict[DomainSet, float]]:
        """Losses by row key and set of domains. Raises ValueError when the file is damaged."""
        path = self.library.path / self.file
        if not path.exists():
            return {}
        try:
            header, *lines = map(json.loads, path.read_text().splitlines())
            same = {domain for domain, stacks in self.stacks.items() if header["stacks"].get(domain) == stacks}
            for line in lines:
                losses = {name: loss for name, loss in line["losses"].items() if same.issuperset(_members(name))}
                self.rows[line["row"]] = line | {"losses": losses}
            return {
                key: {_members(name): loss for name, loss in line["losses"].items()} for key, line in self.rows.items()
            }
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, and it is measured again") from error

    def write(self, found: Sequence[Found]) -> None:
        """Add or replace the lines of these rows, atomically."""
        for item in found:
            key = row_key(item.row)
            ordered = sorted(item.losses, key=lambda names: (len(names), [self.domains.index(name) for name in names]))
            losses = {"+".join(names): item.losses[names] for names in ordered}
            self.rows[key] = {"row": key, "best": list(item.best), "losses": losses}
        text = "".join(json.dumps(line) + "\n" for line in [{"stacks": self.stacks}, *self.rows.values()])
        path = self.library.path / self.file
        if not path.exists() or path.read_text() != text:
            self.library.write_file(self.file, text.encode())


def _members(name: str) -> DomainSet:
    return tuple(name.split("+")) if name else ()


def discover(
    library: Library,
    meter: Meter,
    sources: Mapping[str, Sequence[Row]],
    args: DiscoveryArgs,
    also: Mapping[str, Sequence[DomainSet]] = MappingProxyType({}),
) -> dict[str, list[Found]]:
    """The best set of domains of each row of each source; on every rank, while the main one is writing the library.

    Args:
        sources: rows by the name of their records.
        also: sets wanted besides those that the search asks for, by `row_key`.

    Raises:
        ValueError: if the records of an earlier run are damaged, or `search: exhaustive` has too many domains.
    """
    search = (exhaustive if args.search == "exhaustive" else greedy)(meter.domains, args.min_gain)
    results: dict[str, list[Found]] = {}
    records = {source: Records(library, source, meter.domains) for source in sources}
    known = on_main(lambda: {source: record.read() for source, record in records.items()})

    def missing(item: Found) -> list[DomainSet]:
        item.best, sets = search(item.losses)
        wanted = [*sets, *also.get(row_key(item.row), ())]
        return [names for names in dict.fromkeys(wanted) if names not in item.losses]

    with _Progress(sum(len({*map(row_key, rows)}) for rows in sources.values()), len(meter.domains)) as progress:
        for source, rows in sources.items():
            distinct = {row_key(row): Found(row, known[source].get(row_key(row), {}), ()) for row in rows}
            results[source] = [distinct[row_key(row)] for row in rows]
            by_length = sorted(distinct.values(), key=lambda item: len(item.row.input_ids))
            for start in range(0, len(by_length), BATCHES_PER_CHUNK * meter.batch_size):
                chunk = by_length[start : start + BATCHES_PER_CHUNK * meter.batch_size]
                while pairs := [(item, names) for item in chunk for names in missing(item)]:
                    weights = torch.tensor([[float(d in names) for d in meter.domains] for _, names in pairs])
                    losses = meter.losses([item.row for item, _ in pairs], weights, progress.measured)
                    for (item, names), loss in zip(pairs, losses, strict=True):
                        item.losses[names] = loss
                on_main(partial(records[source].write, chunk))
                progress.finished(len(chunk))
    return results


class _Progress:
    """A bar over losses measured. How far the sets of later rows will grow is extrapolated from earlier ones."""

    def __init__(self, rows: int, domains: int) -> None:
        self.rows, self.rows_done = rows, 0
        self.bar = tqdm(total=rows * 3 * domains, desc="discovery", unit="loss", disable=not is_main(), leave=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def measured(self, losses: int) -> None:
        self.bar.update(losses)

    def finished(self, rows: int) -> None:
        self.rows_done += rows
        self.bar.total = round(self.bar.n * self.rows / self.rows_done)
        self.bar.refresh()
