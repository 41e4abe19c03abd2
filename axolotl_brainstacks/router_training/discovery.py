"""Discovery: finds each prompt's best set of domains by measured loss, and records every loss (arXiv 2604.01152, outcome router).

A set of domains is measured with the weights it would answer with: 1 for the domains in it, their floors for the others.
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

from axolotl_brainstacks.distributed import is_main, on_main
from axolotl_brainstacks.evaluation import Example
from axolotl_brainstacks.guarded import parse_json, printable
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.search import DomainSet, Search

LOG = logging.getLogger(__name__)

FOLDER = "router/discovery"
# Losses are written after each chunk of examples. Smaller chunks lose less work when the process is killed; larger ones leave
# fewer batches that are not full.
BATCHES_PER_CHUNK = 8


@dataclass
class DiscoveryResult:
    """What discovery measured for one example.

    Attributes:
        row: the example.
        losses: by set of domains, the mean loss per answer token in nats.
        best, found_by: as in `search.Choice`.
        base: the loss without any stack; None until it is measured. It differs from the loss of the empty set when a domain has
            a floor.
    """

    row: Example
    losses: dict[DomainSet, float]
    best: DomainSet = ()
    found_by: str = "base"
    base: float | None = None


def set_weights(domain_set: DomainSet, domains: Sequence[str], floors: Mapping[str, float]) -> Tensor:
    """Weights (domains,) of a set: 1 for the domains in it, their floors for the others, as `gate` gives with hard weights."""
    return torch.tensor([1.0 if domain in domain_set else floors.get(domain, 0.0) for domain in domains])


def row_key(row: Example) -> str:
    """A key for an example, derived from its tokens and labels."""
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
    """The losses of a source's prompts, in `router/discovery/<source>.jsonl`.

    The first line of the file has each domain's stacks and floor, and each further line the losses of one example. Reading the
    file drops the losses that no longer hold: those of sets with a domain whose stacks have changed, and those of sets without a
    domain whose floor, or whose stacks under a floor, have changed.

    Args:
        library: that has the file.
        source: a domain, or `data.MIXED`.
        domains: of the library, in its order.
        floors: by domain, its least weight.
    """

    def __init__(self, library: Library, source: str, domains: Sequence[str], floors: Mapping[str, float]) -> None:
        self.library = library
        self.file = f"{FOLDER}/{source}.jsonl"
        self.domains = list(domains)
        self.stacks = {d: [s.name for s in library.manifest.active_stacks if s.domain == d] for d in domains}
        self.floors = {d: floors[d] for d in domains if floors.get(d)}
        self.rows: dict[str, dict[str, Any]] = {}

    def read(self) -> dict[str, tuple[dict[DomainSet, float], float | None]]:
        """The recorded losses that still hold.

        Returns:
            By `row_key`, the losses by set of domains, and the loss without any stack or None. Empty if there is no file, and,
            with a warning, if the file is damaged or not the one in the library's manifest; all is measured again then.
        """
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
        # Losses of a set hold only if it has no domain of `changed` and every domain of `moved`, whose floor then does not act.
        changed = {d for d in {*stacks, *self.stacks} if stacks.get(d) != self.stacks.get(d)}
        moved = {d for d in {*floors, *self.floors} if floors.get(d) != self.floors.get(d) or d in changed}
        known = {}
        for line in lines:
            every = {_members(name): loss for name, loss in line.losses.items()}
            if unknown := {domain for names in every for domain in names} - stacks.keys():
                raise ValueError(f"losses of domain {min(unknown)!r}, whose stacks are not named")
            # Files of versions without floors have no key `base`: the empty set meant the base model there.
            base = line.base if "base" in line.model_fields_set else None if floors else every.get(())
            losses = {s: loss for s, loss in every.items() if changed.isdisjoint(s) and moved.issubset(s)}
            if base is not None and not self.floors:
                losses[()] = base
            known[line.row] = losses, base
            self.rows[line.row] = line.model_dump() | {"base": base, "losses": self._named(losses)}
        return known

    def write(self, found: Sequence[DiscoveryResult]) -> None:
        """Add or replace the lines of these examples. The file is replaced atomically."""
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
        """The losses with each set written as its domains joined by "+", smaller sets first."""
        ordered = sorted(losses, key=lambda names: (len(names), [self.domains.index(name) for name in names]))
        return {"+".join(names): losses[names] for names in ordered}


def _members(name: str) -> DomainSet:
    """The set of domains that is written as `name`."""
    return tuple(name.split("+")) if name else ()


def discover(
    library: Library,
    meter: LossMeter,
    sources: Mapping[str, Sequence[Example]],
    args: RouterArgs,
    named: Mapping[str, Sequence[tuple[str, DomainSet]]] = MappingProxyType({}),
) -> dict[str, list[DiscoveryResult]]:
    """Find the best set of domains of each example. Every process must call this, while the main one holds the library's lock.

    Args:
        library: whose recorded losses are used, and where new ones are written.
        meter: measures the losses.
        sources: by source, its examples.
        args: settings of the search.
        named: by `row_key`, sets to measure in addition to those that the search asks for, each with its name.

    Returns:
        By source, a result for each example, in order. Equal examples share one result.

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
            # Examples of similar length come together, so that batches have little padding.
            by_length = sorted(distinct.values(), key=lambda item: len(item.row.input_ids))
            for start in range(0, len(by_length), BATCHES_PER_CHUNK * meter.batch_size):
                chunk = by_length[start : start + BATCHES_PER_CHUNK * meter.batch_size]
                # Which sets the search asks for next depends on the losses of those before.
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
    """A progress bar that counts losses. Only the search knows how many it needs, so finished examples predict the total."""

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
