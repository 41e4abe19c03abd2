"""Finds the checkpoint that a round resumes from: the newest complete one that was written by the same round."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_brainstacks.distributed import gather_objects
from axolotl_brainstacks.library.storage import json_to_bytes, record_of

LOG = get_logger(__name__)

# The guard writes it into a checkpoint last, so a checkpoint with it is complete.
STATE_FILE = "brainstacks_guard.json"


@dataclass(frozen=True)
class Fingerprint:
    """What a round trains with. The round resumes only from a checkpoint with the same fingerprint.

    sha256: of all of it, hex.
    parts: the first digits of each part's SHA-256 by the part's name, to tell a user what differs.
    """

    sha256: str
    parts: dict[str, str]

    @classmethod
    def of(cls, settings: dict[str, Any], **others: Any) -> Fingerprint:
        """Hash what a round trains with.

        Args:
            settings: the keys of the config by the user's names; the block `brainstacks` is told apart by its keys.
            others: everything else, as JSON values.
        """
        named = {f"`{key}`": value for key, value in settings.items() if key != "brainstacks"}
        named |= {f"`brainstacks.{key}`": value for key, value in settings.get("brainstacks", {}).items()}
        named |= {_WORDS.get(key, key): value for key, value in others.items()}
        parts = {name: _sha256(value)[:16] for name, value in named.items()}
        return cls(_sha256({"settings": settings, **others}), parts)

    def difference(self, parts: dict[str, str]) -> str:
        """The names of the parts that are not as in `parts`, those of a checkpoint, with commas between them."""
        changed = (name for name in self.parts | parts if self.parts.get(name) != parts.get(name))
        return ", ".join(changed)


_WORDS = {
    "library": "the library's place as seen from `output_dir`",
    "base": "the base model",
    "stacks": "the stacks in the library",
    "data": "the rows of the datasets",
    "processes": "the number of processes",
}


def _sha256(value: Any) -> str:
    return record_of(json_to_bytes(value)).sha256


def step_of(checkpoint: Path) -> int:
    """The training step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_complete_checkpoint(folder: Path, fingerprint: Fingerprint) -> Path | None:
    """The newest checkpoint that every rank has a complete part of, or None. Every rank has to call this.

    Args:
        folder: the round's `output_dir`; nodes may have different disks.
        fingerprint: the round's; checkpoints with another one are skipped with a warning that names what differs.
    """
    states = {step_of(path.parent): json.loads(path.read_text()) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")}
    mine = {step for step, state in states.items() if state.get("fingerprint") == fingerprint.sha256}
    if others := states.keys() - mine:
        # Checkpoints of earlier versions do not have the parts.
        parts = states[max(others)].get("fingerprint_parts")
        changed = f" (different: {fingerprint.difference(parts)})" if parts else ""
        LOG.warning(
            "Checkpoints in %s are of another library, config or data, and are not resumed from%s", folder, changed
        )
    complete = set.intersection(*gather_objects(mine))
    return folder / f"checkpoint-{max(complete)}" if complete else None
