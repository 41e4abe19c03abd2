"""Keeps a domain in training out of the directions of all others (arXiv 2604.01152, null space).

Every finished domain has columns of its own in the library, fitted on its own validation rows when the first other domain
needs them. A domain trains against the union of all others' columns, so that removing one takes nothing from the rest.
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
from axolotl_brainstacks.library.manifest import ConstraintRecord

LOG = get_logger(__name__)

Columns = dict[str, Tensor]
# What entries of V^T V may differ by from the identity's: rounding to fp32 is a thousand times smaller.
_ORTHONORMAL = 1e-3


def keep_out_of_others(session: Session, domain: str, rules: NullSpaceArgs, batch_size: int) -> Columns:
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
        session.tuner.set_null_space(ADAPTER_NAME, {})
        return {}
    # Fitted beyond the domain's own columns, the others' would not hold what they share with it.
    session.ledger.forget_columns(domain)
    others, constraint = session.ledger.others(domain), session.ledger.constraint(domain)
    recorded = constraint.protects if constraint else []
    if any(other.columns is None for other in others) or recorded != _names(others):
        _fit_and_record(session, domain, others, rules, batch_size)
        others = session.ledger.others(domain)
    # What was fitted is read back, so that all ranks and all rounds have the same to the last bit.
    union = merge_columns(other.columns for other in others if other.columns)
    session.tuner.set_null_space(ADAPTER_NAME, union)
    return union


def check_columns(library: Library, tuner: StackTuner) -> None:
    """Read all columns that protect a domain, before anything trains against them.

    Raises:
        ValueError: for columns of a projection that carries no stack, of another size than its output, or that are not
            orthonormal, those of earlier domains included: what is projected out would then be something else.
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


def _names(others: Sequence[Protected]) -> list[str]:
    return [other.name for other in others]


def _fit_and_record(
    session: Session, domain: str, others: Sequence[Protected], rules: NullSpaceArgs, batch_size: int
) -> None:
    """Nothing is kept of it if a projection has no direction left."""
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
    """By which a domain is protected: its own where the YAML names it and they ask for columns, else those of the domain in
    training."""
    block = session.ledger.plan.block
    named = protected in [domain.name for domain in block.curriculum]
    own = block.settings_of(protected).null_space if named else rules
    return own if own.directions else rules


def _worth(
    session: Session, others: Sequence[Protected], moments: dict[str, Moments], union: Columns
) -> ConstraintRecord | None:
    if not others:
        return None
    left = capacity(session.tuner, union)
    energies = {name: energy_within(session.tuner, its, union) for name, its in moments.items()}
    # The energy of a domain without rows is in other units: it counts only where there is nothing else.
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
    LOG.info(
        "Null space for %s: %.1f %% of the output energy of %s is protected; %.0f %% of the space is left in the tightest "
        "projection, %s", domain, 100 * record.energy, ", ".join(record.protects), 100 * record.capacity_left, record.tightest
    )  # fmt: skip
    if record.capacity_left < rules.min_capacity:
        LOG.warning(
            "Only %.0f %% of %s is left for new domains; consider fewer `brainstacks.null_space.directions`",
            100 * record.capacity_left, record.tightest,
        )  # fmt: skip
