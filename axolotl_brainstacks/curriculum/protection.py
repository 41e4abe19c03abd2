"""Keeps a domain in training out of the directions of all others (arXiv 2604.01152, null space).

Every finished domain has columns of its own in the library, fitted on its own validation rows when the first other domain
needs them. A domain trains against the union of all others' columns, so that removing one takes nothing from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_brainstacks.adapter.tensors import PREFIX
from axolotl_brainstacks.args import NullSpaceArgs
from axolotl_brainstacks.calibration import (
    Calibration,
    Moments,
    capacity,
    energy_within,
    fit_columns,
    measure,
    merge_columns,
)
from axolotl_brainstacks.curriculum.build import TRAINED
from axolotl_brainstacks.distributed import on_main
from axolotl_brainstacks.evaluation import check_vocabulary, unpack_rows
from axolotl_brainstacks.guarded import printable
from axolotl_brainstacks.manifest import ConstraintRecord
from axolotl_brainstacks.nullspace import leakage

if TYPE_CHECKING:
    from axolotl_brainstacks.adapter.model import BrainstacksModel
    from axolotl_brainstacks.curriculum.runner import CurriculumRunner
    from axolotl_brainstacks.library import Library

LOG = get_logger(__name__)

Columns = dict[str, Tensor]
# What entries of V^T V may differ by from the identity's: rounding to fp32 is a thousand times smaller.
_ORTHONORMAL = 1e-3


@dataclass(frozen=True)
class Protected:
    """A domain to keep out of, with the columns that the library holds for it; None if they are to be fitted."""

    name: str
    calibration: Calibration
    columns: Columns | None


def keep_out_of_others(runner: CurriculumRunner, domain: str, rules: NullSpaceArgs, batch_size: int) -> Columns:
    """Constrain the stack in training to what the other domains leave, before each of `domain`'s rounds.

    Fits the columns of domains that have none, and records what the union of all is worth. Every rank has to call it.

    Args:
        batch_size: rows a forward.

    Returns:
        The union's columns (out, d) by module name; empty when nothing is protected.

    Raises:
        ValueError: if a projection has no direction left for `domain`.
    """
    if not rules.directions:
        runner.tuner.set_null_space(TRAINED, {})
        return {}
    # Fitted beyond the domain's own columns, the others' would not hold what they share with it.
    on_main(lambda: _forget_own(runner, domain))
    others = _others(runner, domain)
    if any(other.columns is None for other in others) or on_main(lambda: _recorded(runner, domain)) != _names(others):
        _fit_and_record(runner, domain, others, rules, batch_size)
        others = _others(runner, domain)
    # What was fitted is read back, so that all ranks and all rounds have the same to the last bit.
    union = merge_columns(other.columns for other in others if other.columns)
    runner.tuner.set_null_space(TRAINED, union)
    return union


def check_columns(library: Library, tuner: BrainstacksModel) -> None:
    """Read all columns that protect a domain, before anything trains against them.

    Raises:
        ValueError: for columns of a projection that carries no stack, of another size than its output, or that are not
            orthonormal, those of earlier domains included: what is projected out would then be something else.
    """
    outputs = {layer.module_name: layer.out_features for layer in tuner.layers()}
    held: Columns = {}
    for entry in library.manifest.domains:
        if entry.protection is not None:
            columns = library.protection(entry.name)
            for name, basis in columns.items():
                if problem := _column_problem(basis, held.get(name, basis[:, :0]), outputs.get(name)):
                    raise ValueError(
                        f"{library.path / entry.protection.file}: the columns of {printable(name)} {problem}: {library.mend}"
                    )
            held = merge_columns([held, columns])


def _column_problem(basis: Tensor, held: Tensor, outputs: int | None) -> str | None:
    """What is wrong with a domain's columns of one projection; `held` are those of earlier domains."""
    if outputs is None:
        return "belong to no projection of this model that a stack is on"
    if len(basis) != outputs:
        return f"have {len(basis)} entries, but its output has {outputs}"
    union = torch.cat([held, basis], dim=1).double()
    if union.shape[1] > outputs:
        return f"and those of earlier domains are {union.shape[1]}, more than its {outputs} outputs"
    gram = union.T @ union
    if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=_ORTHONORMAL):
        return "are not orthonormal, or overlap with those of earlier domains"
    return None


def largest_leakage(columns: Columns, tensors: dict[str, Any]) -> float:
    """Largest share of any projection's B that lies in `columns`; about 1e-7 after folding in fp32."""
    keys = {module: f"{PREFIX}{module}.brainstacks_B.weight" for module in columns}
    shares = [leakage(tensors[keys[module]], basis) for module, basis in columns.items() if keys[module] in tensors]
    return max(shares, default=0.0)


def _others(runner: CurriculumRunner, domain: str) -> list[Protected]:
    """The other domains with something to protect, in the library's order; one that is being replaced as it was before."""

    def read() -> list[Protected]:
        library, attached = runner.library, runner.stack_names()
        replaced = library.manifest.domain(domain).replaced
        others = []
        for entry in library.manifest.domains:
            trained = entry.before or entry
            stacks = [stack for stack in trained.context if stack in attached and stack not in replaced]
            if entry.name == domain or not entry.answers or not stacks:
                continue
            rows = unpack_rows(library.validation_of(trained)) if trained.validation else []
            check_vocabulary(rows, runner.model, f"The validation rows of {entry.name}")
            columns = library.protection(entry.name) if entry.protection else None
            others.append(Protected(entry.name, Calibration(rows, stacks), columns))
        return others

    return on_main(read)


def _forget_own(runner: CurriculumRunner, domain: str) -> None:
    if runner.library.manifest.domain(domain).protection:
        runner.library.unprotect(domain)


def _names(others: Sequence[Protected]) -> list[str]:
    return [other.name for other in others]


def _recorded(runner: CurriculumRunner, domain: str) -> list[str]:
    constraint = runner.library.manifest.domain(domain).constraint
    return constraint.protects if constraint else []


def _fit_and_record(
    runner: CurriculumRunner, domain: str, others: Sequence[Protected], rules: NullSpaceArgs, batch_size: int
) -> None:
    """Nothing is kept of it if a projection has no direction left."""
    share = -(-rules.samples // max(len(others), 1))
    moments = {}
    for other in others:
        rows = other.calibration.rows[
            : _own_rules(runner, other.name, rules).samples if other.columns is None else share
        ]
        calibration = Calibration(rows, other.calibration.stacks)
        moments[other.name] = measure(runner.model, runner.tuner, calibration, batch_size)
    held = {other.name: other.columns for other in others if other.columns is not None}
    beyond = {}
    for other in others:
        if other.columns is None:
            beyond[other.name] = [*held]
            directions = _own_rules(runner, other.name, rules).directions
            held[other.name] = fit_columns(runner.tuner, moments[other.name], merge_columns(held.values()), directions)
    record = _worth(runner, others, moments, merge_columns(held.values()))

    def write() -> None:
        library = runner.library
        for name, fitted_beyond in beyond.items():
            assert record is not None
            library.write_protection(name, held[name], record.energies[name], record.capacity_left, fitted_beyond)
        library.update_domain(domain, constraint=record)

    on_main(write)
    if record is not None:
        _log(domain, record, rules)


def _own_rules(runner: CurriculumRunner, protected: str, rules: NullSpaceArgs) -> NullSpaceArgs:
    """By which a domain is protected: its own where the YAML names it and they ask for columns, else those of the domain in
    training."""
    block = runner.plan.block
    named = protected in [domain.name for domain in block.curriculum]
    own = block.settings_of(protected).null_space if named else rules
    return own if own.directions else rules


def _worth(
    runner: CurriculumRunner, others: Sequence[Protected], moments: dict[str, Moments], union: Columns
) -> ConstraintRecord | None:
    if not others:
        return None
    left = capacity(runner.tuner, union)
    energies = {name: energy_within(runner.tuner, its, union) for name, its in moments.items()}
    # The energy of a domain without rows is in other units: it counts only where there is nothing else.
    measured = [energies[other.name] for other in others if other.calibration.rows] or list(energies.values())
    captured, total = sum(energy.captured for energy in measured), sum(energy.total for energy in measured)
    by_kind: dict[str, float] = {}
    for name, share in left.items():
        kind = name.rpartition(".")[2]
        by_kind[kind] = min(share, by_kind.get(kind, 1.0))
    tightest = min(left, key=lambda name: left[name])
    return ConstraintRecord(
        protects=_names(others),
        columns=max(basis.shape[1] for basis in union.values()),
        energy=captured / total if total else 1.0,
        energies={name: energy.share for name, energy in energies.items()},
        capacity_left=left[tightest],
        tightest=tightest,
        capacity=by_kind,
    )


def _log(domain: str, record: ConstraintRecord, rules: NullSpaceArgs) -> None:
    LOG.info(
        "Null space for %s: %.1f %% of the output energy of %s is protected; %.0f %% of the space is left in the tightest "
        "projection, %s", domain, 100 * record.energy, ", ".join(record.protects), 100 * record.capacity_left, record.tightest
    )  # fmt: skip
    if record.capacity_left < rules.min_capacity:
        LOG.warning(
            "Only %.0f %% of %s is left for new domains; consider fewer `brainstacks.null_space.directions`",
            100 * record.capacity_left, record.tightest,
        )  # fmt: skip
