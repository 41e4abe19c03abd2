"""Checks the library and every domain's data before the base model is loaded, and that all nodes see the same ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import init_distributed_state
from axolotl.utils.logging import get_logger

from axolotl_brainstacks.curriculum.data_files import check_data_files
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.preview import print_plan
from axolotl_brainstacks.curriculum.stages import DomainStage, load_domains
from axolotl_brainstacks.distributed import check_same, is_main, on_each_node, on_every_rank, on_main, shared_by_all
from axolotl_brainstacks.library import Library, Manifest
from axolotl_brainstacks.library.storage import record_of

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = get_logger(__name__)


@dataclass(frozen=True)
class LibraryState:
    """The state of a plan's library at the start of a run.

    path: its folder.
    seen: a short text that changes with its manifest.
    """

    path: Path
    seen: str

    @classmethod
    def same_for_all(cls, plan: Plan) -> LibraryState:
        """Read the library's state. Every rank has to call this.

        Raises:
            ValueError: on every rank, if ranks see different libraries, or `library_sha256` pins another one.
        """
        if plan.block.library_sha256:
            Library.open(plan.library_path, plan.block.library_sha256)
        state = cls(plan.library_path, _state_of(plan.library_path))
        check_same(
            f"The library {state.path}",
            state.seen,
            "put it on a file system that all nodes share, or copy it from the first node to the others",
        )
        return state

    def check_unchanged(self) -> None:
        """Raises ValueError if the library has changed since. To be called while holding its lock."""
        if _state_of(self.path) != self.seen:
            raise ValueError(
                f"The library {self.path} has been changed since this run read it: run the same command again"
            )


@dataclass(frozen=True)
class TrainingRun:
    """A plan whose library and data have been checked, so that only the base model remains to be loaded.

    library: the library's state when it was checked.
    stages: the domains still to be trained, with their data.
    output_shared: whether all nodes see the same `output_dir`.
    """

    plan: Plan
    library: LibraryState
    stages: Sequence[DomainStage]
    output_shared: bool

    @classmethod
    def prepare(cls, plan: Plan, preprocess: bool = False) -> TrainingRun:
        """Check the library, load the data of all domains that remain, and print what the run will do.

        Args:
            preprocess: the run is `axolotl preprocess`: print a table besides the summary.

        Raises:
            ValueError: if the config or the data of a domain is unusable or missing, or nodes see different libraries or data.
            SystemExit: with status 0 if the library holds all domains already.
        """
        init_distributed_state()
        was_there = plan.library_path.exists()
        on_main(lambda: check_library(plan))
        library = LibraryState.same_for_all(plan)
        done = done_domains(plan)
        todo = [domain for domain in plan.block.curriculum if domain.name not in done]
        on_every_rank(lambda: check_data_files(plan, [domain.name for domain in todo]))
        if not todo:
            # An earlier run may have been killed after its last domain, before it removed its checkpoints.
            on_each_node(lambda: remove_leftovers(plan))
            names = ", ".join(domain.name for domain in plan.block.curriculum)
            print(f"Brainstacks: nothing to do, {plan.library_path} holds all domains already: {names}")
            raise SystemExit(0)
        # All data is loaded before anything trains, so that the last domain's mistakes do not show after days.
        stages = on_every_rank(lambda: load_domains(plan.raw, todo, plan.block, with_rl=True, training=not preprocess))
        for stage in stages:
            check_same(f"The data of domain `{stage.name}`", stage.all_data, "give all nodes the same files")
        shared = shared_by_all(Path(plan.raw["output_dir"]))
        if is_main():
            print_plan(plan, stages, whole=preprocess)
            if preprocess and not was_there:
                with suppress(OSError):
                    plan.library_path.rmdir()  # checking that it can be written has made it
        return cls(plan, library, stages, shared)

    @property
    def first_datasets(self) -> TrainDatasetMeta:
        """The data of the first domain, in the form of Axolotl's own; Axolotl asks a plugin for one dataset to train on."""
        from axolotl.common.datasets import TrainDatasetMeta

        first = self.stages[0]
        return TrainDatasetMeta(first.train_dataset, first.eval_dataset, first.total_steps)

    def training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """Training arguments of a round's trainer that Axolotl's builders leave out.

        Its builder for RL trainers does not pass `deepspeed:` on.
        """
        engine = {"deepspeed": cfg.deepspeed} if cfg.rl and cfg.deepspeed else {}
        return engine | {"save_on_each_node": not self.output_shared}


def remove_leftovers(plan: Plan) -> None:
    """Remove the folders of the plan's rounds from `output_dir`; those of other runs stay."""
    stages = Path(plan.raw["output_dir"]) / "stages"
    for domain in plan.block.curriculum:
        for folder in stages.glob(f"{domain.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        stages.rmdir()


def check_library(plan: Plan) -> None:
    """Raises ValueError if the plan's library is damaged, cannot be written, or is not the one that `library_sha256` pins."""
    if plan.block.library_sha256:
        Library.open(plan.library_path, plan.block.library_sha256)
    if not Library.exists(plan.library_path):
        return Library.check_new(plan.library_path)
    # `writing` first moves aside what a killed writer left, so that `damage` does not report it.
    try:
        with Library.open(plan.library_path).writing() as library:
            problems = library.damage()
    except OSError as error:
        raise ValueError(
            f"The library {plan.library_path} cannot be read and written ({error}): fix that, or name another folder "
            "in `brainstacks.library`"
        ) from error
    if problems:
        raise ValueError(f"The library is damaged: {problems[0]}")


def done_domains(plan: Plan) -> set[str]:
    """The finished domains in the plan's library. Raises ValueError if the plan does not fit the library."""
    if not Library.exists(plan.library_path):
        plan.block.check_names([])
        return set()
    library = Library.open(plan.library_path)
    plan.block.check_names(entry.name for entry in library.manifest.domains)
    library.manifest.check_frozen_dtype(plan.block.frozen_dtype)
    _check_rl_rounds(plan, library.manifest)
    done = {entry.name for entry in library.manifest.domains if entry.done}
    if plan.block.domain in done:
        raise ValueError(
            f"brainstacks.domain: `{plan.block.domain}` is already in the library {plan.library_path}; choose "
            f"another name, or remove it with `axolotl brainstacks-library {plan.library_path} remove "
            f"{plan.block.domain}`"
        )
    return done


def _check_rl_rounds(plan: Plan, manifest: Manifest) -> None:
    """Raises ValueError if an unfinished domain has already trained RL rounds that differ from those in the YAML.

    Logs a warning for RL rounds that the YAML adds to a finished domain, because they are not trained.
    """
    entries = {entry.name: entry for entry in manifest.domains}
    for domain in plan.block.curriculum:
        if domain.name not in entries:
            continue
        asked = [entry.rl for entry in domain.rl_rounds]
        behind = [record.rl for record in entries[domain.name].rounds if record.rl]
        if entries[domain.name].done:
            if asked[len(behind) :]:
                LOG.warning(
                    "Domain %s is finished, so its `rl_rounds:` %s are not trained; to train the domain again with them: "
                    "axolotl brainstacks-library %s replace %s",
                    *(domain.name, ", ".join(asked[len(behind) :]), plan.library_path, domain.name),
                )
        elif asked[: len(behind)] != behind:
            raise ValueError(
                f"`rl_rounds:` of domain `{domain.name}` are {', '.join(asked) or 'none'}, but {', '.join(behind)} were "
                "trained before the run was stopped: put these first, as they were"
            )


def _state_of(library: Path) -> str:
    """A short text for errors that is the same for the same manifest."""
    if not Library.exists(library):
        return "nothing there"
    return f"manifest {record_of(Manifest.read_bytes(library)).sha256[:12]}"
