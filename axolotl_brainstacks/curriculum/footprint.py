"""What a run makes before its config has proved right, so that a refused run leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.utils.tee import close_debug_log

from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.locking import FolderLock

DEBUG_LOG = "debug.log"


class Footprint:
    """The places that a run writes to and that did not exist before it.

    They are looked at once, when the config is read: Axolotl makes `output_dir`, with a log in it, before data and library
    are looked at. Nothing that was there before is ever removed, nor is anything once a domain has begun to train.
    """

    def __init__(self, plan: Plan) -> None:
        self.output = output = Path(plan.raw["output_dir"]).absolute()
        self.library = plan.library_path
        self.made = _missing([output, output / DEBUG_LOG, self.library])
        self.prepared = _missing(_prepared_folders(plan))
        self.parents = _missing([parent for path in [*self.made, *self.prepared] for parent in path.parents])
        self.trained = _rounds(self.library)

    def keep_prepared(self) -> None:
        """The data are good, and the next run need not tokenise them again."""
        self.prepared = []

    @contextmanager
    def erased_if_refused(self) -> Iterator[None]:
        """Erase when what is inside raises ValueError or OSError."""
        try:
            yield
        except (ValueError, OSError):
            self.erase()
            raise

    def erase(self) -> None:
        """Remove what this run has made, unless it has begun to train a domain, or another run is writing the library."""
        if _rounds(self.library) != self.trained or any(self.output.glob("stages/*/checkpoint-*")):
            return  # the library alone does not tell: it may be on another node
        with ExitStack() as stack:
            if Library.exists(self.library):
                try:
                    stack.enter_context(FolderLock.of(self.library).hold())
                except ValueError:  # another run is writing it, perhaps with this output_dir
                    return
                except OSError:  # it cannot be written at all
                    pass
            self._remove()

    def _remove(self) -> None:
        if self.made:
            # Axolotl's tees must outlive the call: it holds a lock while it drops them, and their finaliser waits for that lock.
            tees = sys.stdout, sys.stderr
            close_debug_log()
            del tees
        for path in [*self.made, *self.prepared]:
            with suppress(OSError):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        for folder in sorted(self.parents, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()


def _prepared_folders(plan: Plan) -> list[Path]:
    """Where Axolotl keeps tokenised rows."""
    configs = [plan.raw, *(domain.overlay for domain in plan.block.curriculum)]
    configs += [entry.overlay for domain in plan.block.curriculum for entry in domain.rl_rounds]
    named = [config["dataset_prepared_path"] for config in configs if config.get("dataset_prepared_path")]
    return [Path(str(path)) for path in [*named, DEFAULT_DATASET_PREPARED_PATH]]


def _missing(paths: list[Path]) -> list[Path]:
    """Those that do not exist, as absolute paths: the working folder may change."""
    return [path for path in dict.fromkeys(Path(os.path.abspath(path)) for path in paths) if not os.path.lexists(path)]  # noqa: PTH100


def _rounds(library: Path) -> list[tuple[str, int]]:
    """The domains of a library and how many rounds each has; [] for none, or one that cannot be read."""
    try:
        return [(entry.name, len(entry.rounds)) for entry in Library.open(library, sha256="").manifest.domains]
    except (ValueError, OSError):
        return []
