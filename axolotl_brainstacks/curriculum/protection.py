"""Keeps a domain in training out of the output directions of all others (arXiv 2604.01152, null space).

The library has separate columns for each finished domain, fitted on that domain's own validation examples when another
domain first needs them. A domain trains against the union of the others' columns. Because the columns are separate,
removing a domain does not weaken the protection of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_brainstacks.adapter.nullspace import leakage
from axolotl_brainstacks.adapter.tensors import PREFIX
from axolotl_brainstacks.adapter.tuner import StackTuner
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
from axolotl_brainstacks.curriculum.build import ADAPTER_NAME
from axolotl_brainstacks.curriculum.ledger import Protected
from axolotl_brainstacks.curriculum.session import Session
from axolotl_brainstacks.guarded import printable
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import ConstraintRecord

LOG = get_logger(__name__)

Columns = dict[str, Tensor]
# The most by which an entry of V^T V may differ from the identity's; rounding to fp32 changes it a thousand times less.
_ORTHONORMAL = 1e-3


def keep_out_of_others(session: Session, domain: str, rules: NullSpaceArgs, batch_size: int) -> Columns:
    """Constrain the stack in training to output directions that the other domains do not use.

    Each round of `domain` calls this before its first step, on every rank. It fits the columns of domains that have none,
    and records how much of the others' output energy the union of all columns holds.

    Args:
        rules: the `null_space` settings of `domain`.
        batch_size: examples per forward.

    Returns:
        The union's orthonormal columns (out, d) by module name; empty if nothing is protected.

    Raises:
        ValueError: if a projection has no direction left for `domain`.
    """
    if not rules.directions:
        session.tuner.set_null_space(ADAPTER_NAME, {})
        return {}
    # Columns of other domains that were fitted orthogonal to this domain's columns lack the directions that they share with
    # it. While this domain trains, its own columns do not constrain it, so the others' have to be fitted without them.
    session.ledger.forget_columns(domain)
    others, constraint = session.ledger.others(domain), session.ledger.constraint(domain)
    recorded = constraint.protects if constraint else []
    if any(other.columns is None for other in others) or recorded != _names(others):
        _fit_and_record(session, domain, others, rules, batch_size)
        others = session.ledger.others(domain)
    # `others` was read back from the library, so all ranks and all rounds project with the same bits.
    union = merge_columns(other.columns for other in others if other.columns)
    session.tuner.set_null_space(ADAPTER_NAME, union)
    return union


def check_columns(library: Library, tuner: StackTuner) -> None:
    """Check all protecting columns in the library before anything trains against them.

    Raises:
        ValueError: for columns of a module that carries no stack, of another length than its output, or that are not
            orthonormal together with those of earlier domains: B - V V^T B is a projection only if they are.
    """
    outputs = {layer.module_name: layer.out_features for layer in tuner.brainstacks_layers()}
    held: Columns = {}
    for entry in library.manifest.domains:
        if entry.protection is not None:
            columns = library.protection(entry.name)
            for name, basis in columns.items():
                if problem := _column_problem(basis, held.get(name, basis[:, :0]), outputs.get(name)):
                    raise ValueError(
                        f"{library.path / entry.protection.file}: the columns of {printable(name)} {problem}: {library.fix}"
                    )
            held = merge_columns([held, columns])


def _column_problem(basis: Tensor, held: Tensor, outputs: int | None) -> str | None:
    """What is wrong with a domain's columns of one projection, or None.

    Args:
        basis: the domain's columns (out, d).
        held: the columns (out, d') of earlier domains.
        outputs: the projection's output size; None if it carries no stack.
    """
    if outputs is None:
        return "belong to no projection of this model that a stack is on"
    if len(basis) != outputs:
        return f"have {len(basis)} entries, but its output has {outputs}"
    union = torch.cat([held, basis], dim=1).double()  # (out, d' + d)
    if union.shape[1] > outputs:
        return f"and those of earlier domains are {union.shape[1]}, more than its {outputs} outputs"
    # Only the Gram matrix's columns of this domain: those of earlier domains were checked in their turn.
    gram = union.T @ basis.double()  # (d' + d, d); zeros above the identity if the columns are orthonormal
    expected = torch.eye(len(gram), dtype=gram.dtype)[:, held.shape[1] :]
    if not torch.allclose(gram, expected, rtol=0, atol=_ORTHONORMAL):
        return "are not orthonormal, or overlap with those of earlier domains"
    return None


def largest_leakage(columns: Columns, tensors: dict[str, Any]) -> float:
    """The largest share of the norm of any B that lies in the protected columns; about 1e-7 after projecting in fp32.

    Args:
        columns: (out, d) by module name.
        tensors: the stack's tensors by key.
    """
    keys = {module: f"{PREFIX}{module}.brainstacks_B.weight" for module in columns}
    shares = [leakage(tensors[keys[module]], basis) for module, basis in columns.items() if keys[module] in tensors]
    return max(shares, default=0.0)


def _names(others: Sequence[Protected]) -> list[str]:
    return [other.name for other in others]


def _fit_and_record(
    session: Session, domain: str, others: Sequence[Protected], rules: NullSpaceArgs, batch_size: int
) -> None:
    """Fit the columns that are missing, and record them together with the union's figures.

    An error during the fit, as when a projection has no direction left, leaves the library unchanged.
    """
    # Domains with columns are only measured for the record; together they get about as many examples as one fit.
    share = -(-rules.samples // max(len(others), 1))
    moments = {}
    for other in others:
        count = _own_rules(session, other.name, rules).samples if other.columns is None else share
        calibration = Calibration(other.rows[:count], other.stacks)
        moments[other.name] = measure(session.model, session.tuner, calibration, batch_size)
    held = {other.name: other.columns for other in others if other.columns is not None}
    beyond = {}
    for other in others:
        if other.columns is None:
            beyond[other.name] = [*held]
            directions = _own_rules(session, other.name, rules).directions
            held[other.name] = fit_columns(session.tuner, moments[other.name], merge_columns(held.values()), directions)
    record = _worth(session, others, moments, merge_columns(held.values()))
    fitted = {name: (held[name], fitted_beyond) for name, fitted_beyond in beyond.items()}
    session.ledger.record_protection(domain, fitted, record)
    if record is not None:
        _log(domain, record, rules)


def _own_rules(session: Session, protected: str, rules: NullSpaceArgs) -> NullSpaceArgs:
    """The settings that the columns of `protected` are fitted with.

    They are its own if the YAML names the domain and its `directions` are above 0, else `rules`, those of the domain in
    training.
    """
    block = session.ledger.plan.block
    named = protected in [domain.name for domain in block.curriculum]
    own = block.settings_of(protected).null_space if named else rules
    return own if own.directions else rules


def _worth(
    session: Session, others: Sequence[Protected], moments: dict[str, Moments], union: Columns
) -> ConstraintRecord | None:
    """The record of the union of columns; None if there is no other domain."""
    if not others:
        return None
    left = capacity(session.tuner, union)
    energies = {name: energy_within(session.tuner, its, union) for name, its in moments.items()}
    # Without examples, as in an imported domain, the energy comes from the weights alone, in other units. It counts only if
    # no domain has examples.
    measured = [energies[other.name] for other in others if other.rows] or list(energies.values())
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
    left = 100 * record.capacity_left
    LOG.info(
        "Null space for %s: %.1f %% of the output energy of %s is protected; %.0f %% of the space is left in the tightest "
        "projection, %s",
        *(domain, 100 * record.energy, ", ".join(record.protects), left, record.tightest),
    )
    if record.capacity_left < rules.min_capacity:
        LOG.warning(
            "Only %.0f %% of %s is left for new domains; consider fewer `brainstacks.null_space.directions`",
            *(left, record.tightest),
        )
