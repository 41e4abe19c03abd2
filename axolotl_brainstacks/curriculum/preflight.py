"""What is looked at before the base model is loaded: the library, every domain's data, and whether all nodes agree."""

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
    """The library of a plan as all nodes saw it. Raises ValueError where it has changed since."""

    path: Path
    seen: str

    @classmethod
    def same_for_all(cls, plan: Plan) -> LibraryState:
        """Raises ValueError on every rank unless all of them see the same library, and the one that is pinned."""
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
        """Raises ValueError if the library is not what was seen. To be called under its lock."""
        if _state_of(self.path) != self.seen:
            raise ValueError(
                f"The library {self.path} has been changed since this run read it: run the same command again"
            )


@dataclass(frozen=True)
class TrainingRun:
    """A plan whose library and data have been looked at, so that only the base model is still to be loaded.

    stages: the domains still to be trained, with their data. output_shared: all nodes see one `output_dir`.
    """

    plan: Plan
    library: LibraryState
    stages: Sequence[DomainStage]
    output_shared: bool

    @classmethod
    def prepare(cls, plan: Plan, preprocess: bool = False) -> TrainingRun:
        """Check the library, load every stage's data, and print what the run is going to do.

        Args:
            preprocess: print a whole table, not only its summary.

        Raises:
            ValueError: if any domain's config or data is unusable, or nodes do not have the same library or data.
            SystemExit: with status 0 when the library holds all domains already.
        """
        init_distributed_state()
        on_main(lambda: check_library(plan))
        library = LibraryState.same_for_all(plan)
        done = done_domains(plan)
        todo = [domain for domain in plan.block.curriculum if domain.name not in done]
        if not todo:
            # A run may have been killed when nothing but this was left to do.
            on_each_node(lambda: remove_leftovers(plan))
            names = ", ".join(domain.name for domain in plan.block.curriculum)
            print(f"Brainstacks: nothing to do, {plan.library_path} holds all domains already: {names}")
            raise SystemExit(0)
        stages = on_every_rank(lambda: load_domains(plan.raw, todo, plan.block, with_rl=True, training=not preprocess))
        for stage in stages:
            check_same(f"The data of domain `{stage.name}`", stage.all_data, "give all nodes the same files")
        shared = shared_by_all(Path(plan.raw["output_dir"]))
        if is_main():
            print_plan(plan, stages, whole=preprocess)
        return cls(plan, library, stages, shared)

    @property
    def first_datasets(self) -> TrainDatasetMeta:
        """The data of the first domain to be trained, in the form that Axolotl expects of its own datasets."""
        from axolotl.common.datasets import TrainDatasetMeta

        first = self.stages[0]
        return TrainDatasetMeta(first.train_dataset, first.eval_dataset, first.total_steps)

    def training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """What Axolotl's builders do not pass on to a stage's trainer by themselves."""
        engine = {"deepspeed": cfg.deepspeed} if cfg.rl and cfg.deepspeed else {}
        return engine | {"save_on_each_node": not self.output_shared}


def remove_leftovers(plan: Plan) -> None:
    """Remove what rounds of the plan's domains left in `output_dir`; another run's may be beside it."""
    stages = Path(plan.raw["output_dir"]) / "stages"
    for domain in plan.block.curriculum:
        for folder in stages.glob(f"{domain.name}-*"):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        stages.rmdir()


def check_library(plan: Plan) -> None:
    """Raises ValueError if the plan's library is damaged, cannot be written, or is not the one that is pinned."""
    if plan.block.library_sha256:
        Library.open(plan.library_path, plan.block.library_sha256)
    if not Library.exists(plan.library_path):
        return Library.check_new(plan.library_path)
    # In this order: entering removes what a killed writer left behind, which is no damage.
    try:
        with Library.open(plan.library_path).writing() as library:
            problems = library.damage()
    except OSError as error:
        raise ValueError(
            f"The library {plan.library_path} cannot be read and written ({error}): mend that, or name another folder "
            "in `brainstacks.library`"
        ) from error
    if problems:
        raise ValueError(
            f"The library is damaged: {problems[0]}; restore the file from a copy, or remove its domain with "
            f"`axolotl brainstacks-library {plan.library_path} remove DOMAIN` and train it again"
        )


def done_domains(plan: Plan) -> set[str]:
    """The domains that the plan's library holds already. Raises ValueError where plan and library do not go together."""
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
    """Raises ValueError when the RL rounds that a half-trained domain has behind it are others than the YAML's."""
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
    if not Library.exists(library):
        return "nothing there"
    return f"manifest {record_of(Manifest.read_bytes(library)).sha256[:12]}"
