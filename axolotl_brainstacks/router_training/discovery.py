"""Finds each prompt's best set of domains by measured loss (arXiv 2604.01152, outcome router), and keeps every loss.

A set is measured as it would answer: its domains weigh 1, and those outside it their floors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm import tqdm

from axolotl_brainstacks.args import RouterArgs
from axolotl_brainstacks.distributed import is_main, on_main
from axolotl_brainstacks.evaluation import Example
from axolotl_brainstacks.guarded import parse_json, printable
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.search import DomainSet, Search

LOG = logging.getLogger(__name__)

FOLDER = "router/discovery"
# A kill loses at most the chunk it falls into; larger chunks leave fewer batches that are not full.
BATCHES_PER_CHUNK = 8


@dataclass
class DiscoveryResult:
    """What discovery learned about one row.

    losses: mean losses per answer token, in nats, by set of domains. best, found_by: see `search.Choice`. base: the loss
    with no stack at all, which is not that of () when a domain has a floor; None until it is measured.
    """

    row: Example
    losses: dict[DomainSet, float]
    best: DomainSet = ()
    found_by: str = "base"
    base: float | None = None


def set_weights(domain_set: DomainSet, domains: Sequence[str], floors: Mapping[str, float]) -> Tensor:
    """Weights (domains,) of a set: 1 in it, the floor outside. What `gate` gives a router with hard weights."""
    return torch.tensor([1.0 if domain in domain_set else floors.get(domain, 0.0) for domain in domains])


def row_key(row: Example) -> str:
    """Names a row by its tokens."""
    return hashlib.sha256(json.dumps([row.input_ids, row.labels]).encode()).hexdigest()[:16]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)

    stacks: dict[str, list[str]]
    floors: dict[str, float] = {}


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    row: str
    best: list[str] = []
    losses: dict[str, float]
    base: float | None = None


class Records:
    """`router/discovery/<source>.jsonl`: first a line with each domain's stacks and floor, then a line per row.

    What has changed since is left out when the file is read: losses under sets with a domain that has other stacks now,
    and those under sets outside which a domain weighs another floor, or the same floor of other stacks.
    """

    def __init__(self, library: Library, source: str, domains: Sequence[str], floors: Mapping[str, float]) -> None:
        self.library, self.file, self.domains = library, f"{FOLDER}/{source}.jsonl", list(domains)
        self.stacks = {d: [s.name for s in library.manifest.active_stacks if s.domain == d] for d in domains}
        self.floors = {d: floors[d] for d in domains if floors.get(d)}
        self.rows: dict[str, dict[str, Any]] = {}

    def read(self) -> dict[str, tuple[dict[DomainSet, float], float | None]]:
        """By row key: the losses by set of domains, and the base's. Nothing, with a warning, when the file is not what the
        library's manifest says: it is measured again then."""
        path = self.library.path / self.file
        try:
            data = self.library.read_file(self.file)
            if data is None:
                if path.exists():
                    LOG.warning("%s is not listed in the library's manifest: its losses are measured again", path)
                return {}
            header, *lines = (parse_json(line, non_finite=True) for line in data.splitlines())
            return self._losses(_Header.model_validate(header), [_Line.model_validate(line) for line in lines])
        except (ValueError, OSError) as error:
            LOG.warning("%s cannot be used, so its losses are measured again (%s)", path, printable(error))
            self.rows = {}
            return {}

    def _losses(self, header: _Header, lines: list[_Line]) -> dict[str, tuple[dict[DomainSet, float], float | None]]:
        stacks, floors = header.stacks, header.floors
        changed = {d for d in {*stacks, *self.stacks} if stacks.get(d) != self.stacks.get(d)}
        moved = {d for d in {*floors, *self.floors} if floors.get(d) != self.floors.get(d) or d in changed}
        known = {}
        for line in lines:
            every = {_members(name): loss for name, loss in line.losses.items()}
            if unknown := {domain for names in every for domain in names} - stacks.keys():
                raise ValueError(f"losses of domain {min(unknown)!r}, whose stacks are not named")
            # Before there were floors, the empty set was the base.
            base = line.base if "base" in line.model_fields_set else None if floors else every.get(())
            losses = {s: loss for s, loss in every.items() if changed.isdisjoint(s) and moved.issubset(s)}
            if base is not None and not self.floors:
                losses[()] = base
            known[line.row] = losses, base
            self.rows[line.row] = line.model_dump() | {"base": base, "losses": self._named(losses)}
        return known

    def write(self, found: Sequence[DiscoveryResult]) -> None:
        """Add or replace the lines of these rows, atomically."""
        for item in found:
            key = row_key(item.row)
            self.rows[key] = {
                "row": key,
                "best": list(item.best),
                "found_by": item.found_by,
                "base": item.base,
                "losses": self._named(item.losses),
            }
        header = {"stacks": self.stacks, "floors": self.floors}
        text = "".join(json.dumps(line) + "\n" for line in [header, *self.rows.values()])
        self.library.write_file(self.file, text.encode())

    def _named(self, losses: Mapping[DomainSet, float]) -> dict[str, float]:
        ordered = sorted(losses, key=lambda names: (len(names), [self.domains.index(name) for name in names]))
        return {"+".join(names): losses[names] for names in ordered}


def _members(name: str) -> DomainSet:
    return tuple(name.split("+")) if name else ()


def discover(
    library: Library,
    meter: LossMeter,
    sources: Mapping[str, Sequence[Example]],
    args: RouterArgs,
    named: Mapping[str, Sequence[tuple[str, DomainSet]]] = MappingProxyType({}),
) -> dict[str, list[DiscoveryResult]]:
    """The best set of domains of each row of each source; on every rank, while the main one is writing the library.

    Args:
        sources: rows by the name of their records.
        named: sets to measure whatever the search does, with their names, by `row_key`.

    Raises:
        ValueError: if `search: exhaustive` has too many domains.
    """
    search = Search.of(meter.domains, args)
    results: dict[str, list[DiscoveryResult]] = {}
    records = {source: Records(library, source, meter.domains, args.floors) for source in sources}
    known = on_main(lambda: {source: record.read() for source, record in records.items()})
    without_stacks = torch.zeros(len(meter.domains))

    def missing(item: DiscoveryResult) -> list[DomainSet | None]:
        """The sets to measure next; None stands for the base."""
        choice = search.choose(item.losses, named.get(row_key(item.row), ()))
        item.best, item.found_by = choice.best, choice.found_by
        wanted: list[DomainSet | None] = [*choice.missing]
        if records[source].floors:
            return [*wanted, None] if item.base is None else wanted
        item.base = item.losses.get(())
        return wanted

    def weights(domain_set: DomainSet | None) -> Tensor:
        return without_stacks if domain_set is None else set_weights(domain_set, meter.domains, args.floors)

    with _Progress(sum(len({*map(row_key, rows)}) for rows in sources.values()), len(meter.domains)) as progress:
        for source, rows in sources.items():
            distinct: dict[str, DiscoveryResult] = {}
            for row in rows:
                losses, base = known[source].get(row_key(row), ({}, None))
                distinct[row_key(row)] = DiscoveryResult(row, losses, base=base)
            results[source] = [distinct[row_key(row)] for row in rows]
            by_length = sorted(distinct.values(), key=lambda item: len(item.row.input_ids))
            for start in range(0, len(by_length), BATCHES_PER_CHUNK * meter.batch_size):
                chunk = by_length[start : start + BATCHES_PER_CHUNK * meter.batch_size]
                while pairs := [(item, names) for item in chunk for names in missing(item)]:
                    asked = torch.stack([weights(names) for _, names in pairs])
                    measured = meter.losses([item.row for item, _ in pairs], asked, progress.measured)
                    for (item, names), loss in zip(pairs, measured, strict=True):
                        if names is None:
                            item.base = loss
                        else:
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
