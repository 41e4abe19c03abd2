"""A training run's access to its library.

Every rank calls every method, and all get the same result; only the main process reads and writes the library's files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.preflight import LibraryState
from axolotl_brainstacks.curriculum.stages import DomainStage
from axolotl_brainstacks.distributed import on_main
from axolotl_brainstacks.evaluation import Example, check_vocabulary, pack_rows, unpack_rows
from axolotl_brainstacks.library import DomainEntry, Library, RoundRecord, replacement
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.entries import ConstraintRecord
from axolotl_brainstacks.library.manifest import Manifest
from axolotl_brainstacks.library.report import FORGETTING, SAMPLES, read_records, write_report

LOG = get_logger(__name__)


@dataclass(frozen=True)
class Measured:
    """A domain to measure.

    rows: its validation examples.
    context: the stacks that were on when it was trained, its own included.
    """

    name: str
    rows: list[Example]
    context: list[str]


@dataclass(frozen=True)
class Protected:
    """A domain whose output directions the domain in training has to leave alone.

    rows: the validation examples that its output deltas are measured on.
    stacks: the stacks that are on for this.
    columns: (out, d) by module name, as stored in the library; None if they have not been fitted yet.
    """

    name: str
    rows: list[Example]
    stacks: list[str]
    columns: dict[str, Tensor] | None


class Ledger:
    """The library of one run. Only the main process has the attribute `library`."""

    def __init__(self, plan: Plan, tuner: StackTuner, library: Library | None) -> None:
        self.plan, self.tuner, self._library = plan, tuner, library

    @classmethod
    @contextmanager
    def opened(cls, plan: Plan, tuner: StackTuner, state: LibraryState) -> Iterator[Ledger]:
        """Open the plan's library, or create it, and hold its lock.

        Raises:
            ValueError: if the library differs from `state`, belongs to another base model, or another process writes it.
        """
        base = BaseModelInfo.of(tuner.model, plan.raw["base_model"], plan.raw.get("revision_of_model"))
        ledger = cls(plan, tuner, None)
        with ExitStack() as lock:
            on_main(lambda: ledger._enter(state, base, lock))
            yield ledger

    def _enter(self, state: LibraryState, base: BaseModelInfo, lock: ExitStack) -> None:
        path, frozen_dtype = self.plan.library_path, self.plan.block.frozen_dtype
        if Library.exists(path):
            library = Library.open(path)
            lock.enter_context(library.writing())
            state.check_unchanged()
            library.set_frozen_dtype(frozen_dtype)
            library.complete_base(base)
            _warn_of_another_precision(library.manifest, base)
        else:
            state.check_unchanged()
            library = Library.create(path, base, frozen_dtype)
            lock.enter_context(library.writing())
        # Written before the first stack, so that PEFT can load the library of an interrupted run too.
        library.write_root_config(BrainstacksConfig.for_library(self.plan.raw["base_model"], ".").to_dict())
        self._library = library

    @property
    def library(self) -> Library:
        assert self._library is not None, "only the main process has the library"
        return self._library

    # Reading

    def entry(self, domain: str) -> DomainEntry | None:
        """The manifest's entry of a domain, None if it is not listed yet."""
        return on_main(lambda: self._entry(domain))

    def _entry(self, domain: str) -> DomainEntry | None:
        return next((entry for entry in self.library.manifest.domains if entry.name == domain), None)

    def stack_names(self) -> list[str]:
        """The names of all stacks in the library, oldest first."""
        return on_main(lambda: [stack.name for stack in self.library.manifest.stacks])

    def next_stack_name(self, domain: str) -> str:
        """As `Manifest.next_stack_name`."""
        return on_main(lambda: self.library.manifest.next_stack_name(domain))

    def context_of(self, domain: str) -> list[str]:
        """Names of the attached stacks that are on while `domain` trains, one that is not in the manifest yet included."""
        isolated = self.plan.block.context == "isolated"

        def read() -> tuple[list[str], list[str]]:
            manifest = self.library.manifest
            return manifest.training_context(domain, isolated), [stack.name for stack in manifest.stacks]

        context, recorded = on_main(read)
        return [
            stack.name
            for stack in self.tuner.stacks
            if stack.name in context or (stack.domain == domain and stack.name not in recorded)
        ]

    def below(self) -> dict[str, Any]:
        """What a round trains on top of, as a JSON value: the base model's record and all stacks."""

        def read() -> dict[str, Any]:
            manifest = self.library.manifest
            return {
                "base": manifest.base.model_dump(include={"config_hash", "fingerprint", "weights"}),
                "stacks": [entry.model_dump() for entry in manifest.stacks],
            }

        return on_main(read)

    def rows_of(self, domain: str) -> tuple[list[Example], list[Example]]:
        """The validation examples that a domain's losses are measured on, and the spare ones."""

        def read() -> tuple[list[Example], list[Example]]:
            entry = self.library.manifest.domain(domain)
            rows = self._rows(entry)
            measured = len(rows) if entry.eval_rows is None else entry.eval_rows
            return rows[:measured], rows[measured:]

        return on_main(read)

    def _rows(self, entry: DomainEntry) -> list[Example]:
        rows = unpack_rows(self.library.validation_of(entry), f"the validation examples of {entry.name}")
        check_vocabulary(rows, self.tuner.model, f"The validation examples of {entry.name}")
        return rows

    def when_finished(self, domain: str) -> tuple[list[Measured], list[str], list[str]]:
        """What there is to measure for the forgetting matrix, as if `domain` were finished already.

        Returns:
            The finished domains with validation examples, the names of all stacks, and the names of the finished domains
            without validation examples.
        """

        def read() -> tuple[list[Measured], list[str], list[str]]:
            manifest = self.library.manifest.model_copy(deep=True)
            replacement.finish(manifest, domain)
            every_stack = [stack.name for stack in manifest.active_stacks]
            finished = [entry for entry in manifest.domains if entry.done]
            measured = [
                Measured(
                    entry.name,
                    self._rows(entry)[: entry.eval_rows],
                    [name for name in entry.context if name in every_stack],
                )
                for entry in finished
                if entry.validation is not None
            ]
            return measured, every_stack, [entry.name for entry in finished if entry.validation is None]

        return on_main(read)

    def others(self, domain: str) -> list[Protected]:
        """The other domains that have stacks to protect, in the library's order.

        A domain that is being replaced is protected as it was before, because its old stacks go on answering.
        """
        attached = [stack.name for stack in self.tuner.stacks]

        def read() -> list[Protected]:
            replaced = self.library.manifest.domain(domain).replaced
            others = []
            for entry in self.library.manifest.domains:
                trained = entry.before or entry
                stacks = [stack for stack in trained.context if stack in attached and stack not in replaced]
                if entry.name == domain or not entry.answers or not stacks:
                    continue
                rows = self._rows(trained) if trained.validation else []
                columns = self.library.protection(entry.name) if entry.protection else None
                others.append(Protected(entry.name, rows, stacks, columns))
            return others

        return on_main(read)

    def constraint(self, domain: str) -> ConstraintRecord | None:
        """The record of the columns that `domain` was last trained against."""
        return on_main(lambda: self.library.manifest.domain(domain).constraint)

    # Writing

    def start_domain(self, stage: DomainStage, base_loss: float) -> None:
        """List a domain, or renew one that is being replaced, with the validation examples for all of its later losses.

        Args:
            base_loss: loss of the base model on these examples, in nats per answer token.
        """
        packed, measured = pack_rows([*stage.rows, *stage.spare_rows]), len(stage.rows)

        def write() -> None:
            if self._entry(stage.name) is not None:
                return self.library.renew_validation(stage.name, base_loss, packed, measured)
            soft = stage.name in self.plan.block.router.soft_domains
            entry = DomainEntry(name=stage.name, base_loss=base_loss, eval_rows=measured, soft=soft)
            return self.library.add_domain(entry, packed)

        on_main(write)

    def record_round(
        self,
        domain: str,
        record: RoundRecord,
        stack: tuple[dict[str, Any], dict[str, Tensor]] | None,
    ) -> RoundRecord:
        """Record a round.

        Args:
            stack: config and tensors of the round's stack; None if it was not kept.

        Returns:
            The record as stored, with the stack's name.
        """
        context = self.context_of(domain)[:-1]  # without the round's own stack, which `Library.add_stack` appends

        def write() -> RoundRecord:
            if stack is None:
                self.library.record_round(domain, record)
            else:
                config, tensors = stack
                self.library.add_stack(domain, record.round, config, tensors, record, context)
            return self.library.manifest.domain(domain).rounds[-1]

        return on_main(write)

    def forget_columns(self, domain: str) -> None:
        """Drop the columns that protect `domain`, and those of other domains that were fitted orthogonal to them."""

        def write() -> None:
            if self.library.manifest.domain(domain).protection:
                self.library.unprotect(domain)

        on_main(write)

    def record_protection(
        self,
        domain: str,
        fitted: Mapping[str, tuple[dict[str, Tensor], list[str]]],
        constraint: ConstraintRecord | None,
    ) -> None:
        """Store the columns that were fitted for other domains, and the record of the union.

        Args:
            domain: the domain in training.
            fitted: by protected domain, its columns (out, d) by module name, and the domains whose columns they are
                orthogonal to.
            constraint: the record of the union of all columns; None if there is nothing to protect.
        """

        def write() -> None:
            for name, (columns, beyond) in fitted.items():
                assert constraint is not None
                energy, left = constraint.energies[name], constraint.capacity_left
                self.library.write_protection(name, columns, energy, left, beyond)
            # Last, because a resumed run takes this record as proof that all columns were stored.
            self.library.update_domain(domain, constraint=constraint)

        on_main(write)

    def record_samples(self, domain: str, round_number: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Store the sampled answers of a domain's round for the report, in place of older ones."""

        def write() -> None:
            old = read_records(self.library, SAMPLES)
            kept = [line for line in old if (line["domain"], line["round"]) != (domain, round_number)]
            self.library.write_file(SAMPLES, "".join(json.dumps(line) + "\n" for line in [*kept, *lines]).encode())

        on_main(write)

    def record_forgetting(self, domain: str, row: Mapping[str, Any]) -> None:
        """Store the row of the forgetting matrix that was measured after `domain`, in place of an older one."""

        def write() -> None:
            rows = [old for old in read_records(self.library, FORGETTING) if old["after"] != domain]
            self.library.write_file(FORGETTING, json.dumps([*rows, {"after": domain, **row}], indent=2).encode())

        on_main(write)

    def finish_domain(self, domain: str) -> DomainEntry:
        """Mark a domain as finished, and draw the report."""

        def write() -> DomainEntry:
            entry = self.library.finish_domain(domain)
            write_report(self.library)
            return entry

        return on_main(write)


def _warn_of_another_precision(manifest: Manifest, base: BaseModelInfo) -> None:
    """Log a warning if the base model of a library with stacks is loaded in other types than for its first domain.

    Libraries of earlier versions do not say how it was loaded.
    """
    before, now = manifest.base.loaded_as, base.loaded_as
    if manifest.stacks and before and now and before != now:
        LOG.warning(
            "The library was trained on its base model in %s, and this run loads it in %s: new losses do not compare exactly "
            "with those of earlier domains; set `bf16`, `fp16` and `load_in_4bit` as they were, unless you mean it",
            *(before, now),
        )
