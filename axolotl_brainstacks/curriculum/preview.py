"""Prints before training what a run will do and need: examples, steps, stacks, disk and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import DatasetDict
from datasets.exceptions import DatasetsError
from rich.console import Console
from rich.table import Table

from axolotl_brainstacks.args import DomainArgs
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.sizes import Sizes
from axolotl_brainstacks.curriculum.stages import DomainStage
from axolotl_brainstacks.evaluation import pack_rows
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.manifest import Manifest

LOG = get_logger(__name__)

_WIDTH = 120


@dataclass(frozen=True)
class DomainPreview:
    """What a run will do with one domain. If it is `done`, only the first four fields are set.

    stacks: stacks of the domain in the library at the end, at most.
    protected: whether the library already has columns that protect it.
    rounds, rl_rounds: the most supervised rounds, and the kinds of its RL rounds.
    dropped_rows: examples of `datasets:` that Axolotl dropped; None if that is not known.
    kept_rows: validation examples that the library keeps.
    steps: steps of one supervised round.
    rl_steps: steps of each RL round; None if they are only known once it runs.
    directions, samples, min_capacity: the domain's `null_space` settings.
    """

    name: str
    stacks: int
    done: bool = False
    protected: bool = False
    rounds: int = 0
    rl_rounds: tuple[str, ...] = ()
    training_rows: int = 0
    dropped_rows: int | None = None
    validation_rows: int = 0
    kept_rows: int = 0
    steps: int = 0
    rl_steps: tuple[int | None, ...] = ()
    tokens_per_step: int = 0
    directions: int = 0
    samples: int = 0
    min_capacity: float = 0.0

    @property
    def total_steps(self) -> int:
        """The most steps of all rounds, without RL rounds whose steps are not known."""
        return self.steps * self.rounds + sum(steps or 0 for steps in self.rl_steps)


@dataclass(frozen=True)
class Preview:
    """What a run will do with all domains.

    others: the number of stacks in the library that belong to other domains.
    unprotected: how many of these other domains have no columns that protect them yet.
    columns: protecting columns per projection that the library has now.
    validation_bytes: size of the validation examples that the run adds.
    offloaded: whether frozen stacks stay in CPU memory.
    """

    domains: list[DomainPreview]
    others: int
    unprotected: int
    columns: int
    validation_bytes: int
    sizes: Sizes | None
    offloaded: bool

    @property
    def stacks(self) -> int:
        """The most stacks in the library at the end."""
        return self.others + sum(domain.stacks for domain in self.domains)

    @property
    def total_steps(self) -> int:
        return sum(domain.total_steps for domain in self.domains)

    @property
    def all_columns(self) -> int:
        """The most protected directions per projection at the end."""
        return self.columns + sum(self._fitted())

    def _fitted(self) -> list[int]:
        """The number of columns of every fit to come."""
        return [columns for _, fits in self._fits() for columns in fits]

    def _fits(self) -> Iterator[tuple[DomainPreview, list[int]]]:
        """Yield each domain that will train in the null space of others, with the columns of every fit before it.

        A domain's columns are fitted when the first other domain trains after it with `null_space.directions` above 0, so
        the last domain of a run has none.
        """
        waiting = [0] * self.unprotected
        for domain in self.domains:
            if domain.directions and not domain.done:
                yield domain, [own or domain.directions for own in waiting]
                waiting = []
            waiting += [] if domain.protected else [domain.directions]

    def library_bytes(self, sizes: Sizes) -> int:
        """The most bytes on disk of stacks, null-space columns and validation examples; the router comes on top."""
        bases = sum(sizes.null_space(directions) for directions in self._fitted()) + sizes.null_space(self.columns)
        return self.stacks * sizes.stack_file + bases + self.validation_bytes

    def notes(self) -> Iterator[str]:
        """Yield what to mend before training: validation examples that are too few, and a null space that fills up."""
        yield from self._few_examples()
        if self.sizes is not None:
            yield from self._full_null_space(min(layer.out_features for layer in self.sizes.layers))

    def _full_null_space(self, narrowest: int) -> Iterator[str]:
        """Yield a note for the first domain that may find too few output directions. `narrowest`: outputs of a projection."""
        held = self.columns
        for domain, fits in self._fits():
            held += sum(fits)
            if (left := 1 - min(held / narrowest, 1.0)) < max(domain.min_capacity, 1 / narrowest):
                finds = f"only {left:.0%} of its directions free" if left else "no direction free, and stop"
                yield (
                    f"{domain.name} may find {finds}: up to {held} directions will protect other domains, and the narrowest "
                    f"projection has {narrowest} outputs: lower brainstacks.null_space.directions now, because those of "
                    "trained domains stay"
                )
                return

    def _few_examples(self) -> Iterator[str]:
        """Yield a note for each domain that keeps fewer validation examples than fitting its columns asks for."""
        for domain, after in pairwise(self.domains):
            if after.directions and not domain.done and domain.kept_rows < after.samples:
                yield (
                    f"{domain.name} has {domain.kept_rows} validation examples, and fitting the columns that protect it asks for "
                    f"{after.samples}: raise val_set_size or name more in test_datasets, or lower "
                    "brainstacks.null_space.samples"
                )

    def table(self) -> Table:
        """A table with one line per domain."""
        table = Table(title="Plan: at most what is below, less where a round ends early or does not help")
        table.add_column("domain")
        data = ("training examples", "dropped", "validation examples (kept)")
        for column in (*data, "steps a round", "rounds", "RL rounds", "tokens a step", "stacks"):
            table.add_column(column, justify="right")
        for domain in self.domains:
            if domain.done:
                table.add_row(domain.name, "done", "", "", "", "", "", "", str(domain.stacks))
            else:
                table.add_row(
                    domain.name,
                    f"{domain.training_rows:,}",
                    "?" if domain.dropped_rows is None else f"{domain.dropped_rows:,}",
                    f"{domain.validation_rows:,} ({domain.kept_rows:,})",
                    f"{domain.steps:,}",
                    str(domain.rounds),
                    ", ".join(
                        f"{kind} {'?' if steps is None else steps}"
                        for kind, steps in zip(domain.rl_rounds, domain.rl_steps, strict=True)
                    )
                    or "-",
                    f"{domain.tokens_per_step:,}",
                    str(domain.stacks),
                )
        return table

    def summary(self) -> list[str]:
        """Lines about the whole run: what it trains, and how much disk and memory it needs."""
        unknown = any(steps is None for domain in self.domains for steps in domain.rl_steps)
        todo = [domain.name for domain in self.domains if not domain.done]
        others = f", {self.others} of other domains among them" if self.others else ""
        lines = [
            f"to train: {', '.join(todo)}; at most {self.total_steps:,} steps"
            f"{' and those of RL rounds by epochs' if unknown else ''}, {self.stacks} stacks in the library at its end{others}"
        ]
        if (sizes := self.sizes) is None:
            return lines
        frozen = max(self.stacks - 1, 0) * sizes.frozen_stack
        null_space = sizes.null_space(self.all_columns)
        here = sizes.base + sizes.trained_stack + null_space + (0 if self.offloaded else frozen)
        lines += [
            f"disk: {size(sizes.stack_file)} a stack, {size(self.library_bytes(sizes))} the library without its router",
            f"memory of a process in the last round, without activations: about {size(here)} = base model "
            f"{size(sizes.base)} + stack in training with gradients and optimiser {size(sizes.trained_stack)} + "
            + ("" if self.offloaded else f"frozen stacks {size(frozen)} + ")
            + f"null space {size(null_space)}"
            + (f"; in CPU memory, frozen stacks {size(frozen)}" if self.offloaded else ""),
        ]
        return lines


def print_plan(plan: Plan, todo: Sequence[DomainStage], whole: bool) -> None:
    """Print what training the domains `todo` will do and need.

    Args:
        whole: print a table too, which also counts the examples that Axolotl dropped.
    """
    made = preview(plan, todo, whole)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    if whole:
        console.print(made.table())
    for line in [*made.summary(), *made.notes()]:
        console.print(f"Brainstacks: {line}", soft_wrap=True, highlight=False, markup=False)


def preview(plan: Plan, todo: Sequence[DomainStage], count_raw: bool) -> Preview:
    """Compute what training the domains `todo` will do and need.

    Args:
        count_raw: open the raw datasets too, to count the examples that Axolotl dropped.
    """
    manifest = Library.open(plan.library_path).manifest if Library.exists(plan.library_path) else None
    entries = manifest.domains if manifest else []
    protected = [entry.name for entry in entries if entry.protection]
    stages = {stage.name: stage for stage in todo}
    domains = [
        _todo(plan, entry, stages[entry.name], count_raw)
        if entry.name in stages
        else DomainPreview(entry.name, _held(manifest, entry.name), done=True, protected=entry.name in protected)
        for entry in plan.block.curriculum
    ]
    others = [entry for entry in entries if entry.name not in {domain.name for domain in domains}]
    return Preview(
        domains,
        others=sum(_held(manifest, entry.name) for entry in others),
        unprotected=sum(entry.protection is None for entry in others),
        columns=sum(entry.protection.columns for entry in entries if entry.protection and entry.name not in stages),
        validation_bytes=sum(len(pack_rows([*stage.rows, *stage.spare_rows])) for stage in todo),
        sizes=_sizes(plan, todo[0].cfg),
        offloaded=plan.block.offload_frozen,
    )


def _sizes(plan: Plan, cfg: DictDefault) -> Sizes | None:
    try:
        return Sizes.of(plan, cfg)
    except Exception as error:  # a model with remote code may fail in any way on the meta device, and still train well
        LOG.warning("The sizes of stacks are not known before the base model is loaded: %s", error)
        return None


def _held(manifest: Manifest | None, domain: str) -> int:
    return sum(stack.domain == domain for stack in manifest.stacks) if manifest else 0


def _todo(plan: Plan, entry: DomainArgs, stage: DomainStage, count_raw: bool) -> DomainPreview:
    block, cfg = plan.block.settings_of(entry.name), stage.cfg
    training, validation = len(stage.train_dataset), len(stage.eval_dataset)
    prepared = training if cfg.test_datasets else training + validation
    raw = _raw_rows(cfg) if count_raw else None
    return DomainPreview(
        entry.name,
        stacks=block.boosting.max_rounds + len(entry.rl_rounds),
        rounds=block.boosting.max_rounds,
        rl_rounds=tuple(rl_round.rl for rl_round in entry.rl_rounds),
        training_rows=training,
        dropped_rows=None if raw is None else raw - prepared,
        validation_rows=validation,
        kept_rows=len(stage.rows) + len(stage.spare_rows),
        steps=_steps(stage),
        rl_steps=tuple(rl_round.cfg.max_steps or rl_round.total_steps for rl_round in stage.rl_rounds),
        tokens_per_step=cfg.batch_size * cfg.sequence_len,
        directions=block.null_space.directions,
        samples=block.null_space.samples,
        min_capacity=block.null_space.min_capacity,
    )


def _steps(stage: DomainStage) -> int:
    if stage.cfg.max_steps:
        return int(stage.cfg.max_steps)
    if stage.total_steps is not None and stage.total_steps >= 0:
        return stage.total_steps
    # `axolotl preprocess` loads the data without computing the steps.
    return int(calculate_total_num_steps(stage.cfg, stage.train_dataset, update=False))


def _raw_rows(cfg: DictDefault) -> int | None:
    """The number of examples in `datasets:` before Axolotl drops any; None if only its prepared copy is still there."""
    try:
        return sum(_raw_count(dataset, cfg) for dataset in datasets_with_name_generator(cfg.datasets))
    except (OSError, ValueError, DatasetsError) as error:
        LOG.info("Dropped examples are not counted, because the raw data cannot be read: %s", error)
        return None


def _raw_count(dataset: DictDefault, cfg: DictDefault) -> int:
    raw = load_dataset_with_config(dataset, cfg.hf_use_auth_token)
    if isinstance(raw, DatasetDict):
        raw = raw[dataset.split if dataset.split in raw else "train"]
    count = len(raw)
    if dataset.shards:
        count = count // dataset.shards + ((dataset.shards_idx or 0) < count % dataset.shards)
    return max(1, int(count * dataset.weight)) if dataset.weight and count else count


def size(count: int) -> str:
    """A number of bytes as text, in decimal units."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 1000 * one else f"{count / one:,.0f} {unit}"
    return f"{count} bytes"
