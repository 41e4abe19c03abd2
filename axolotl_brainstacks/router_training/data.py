"""The held-out prompts that the router is trained and evaluated on, and where they come from."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from axolotl_brainstacks.args import DomainArgs
from axolotl_brainstacks.evaluation import Example, pack_rows, unpack_rows
from axolotl_brainstacks.library import DomainEntry, Library

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl_brainstacks.curriculum.plan import Plan
    from axolotl_brainstacks.curriculum.stages import DomainStage, Stage

LOG = logging.getLogger(__name__)

# Earlier versions kept prompts in another folder. They drew them from training examples, so those files are not read.
FOLDER = "router/prompts"
# The source of prompts of several domains. Names of domains start with a letter, so none is equal to it.
MIXED = "_mixed"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its answer.

    Attributes:
        row: the tokenised example.
        source: the domain whose data it comes from, or `MIXED`.
        labels: the domains that it was written for; empty if that is not known.
    """

    row: Example
    source: str
    labels: tuple[str, ...]


def load_samples(plan: Plan, library: Library, domains: Sequence[str]) -> list[Sample]:
    """Load up to `router.samples` held-out prompts of each domain and of `router.mixed_datasets`.

    The prompts of a domain that the YAML names come from its `router_datasets`, or else from its validation data. Those of
    another domain are the ones that the last run kept, or else its validation examples in the library. A prompt is left out if
    any domain of the YAML was trained on it.

    Args:
        plan: of the YAML.
        library: whose router is made.
        domains: of the library, that the router chooses among.

    Raises:
        ValueError: if a file of theirs is missing, or a domain has no held-out prompts, or none with an answer.
    """
    from axolotl_brainstacks.curriculum.data_files import check_data_files
    from axolotl_brainstacks.curriculum.stages import load_domains

    args = plan.block.router
    named = [domain for domain in plan.block.curriculum if domain.name in domains]
    check_data_files(plan, [domain.name for domain in named])
    stages = {stage.name: stage for stage in load_domains(plan.raw, named, plan.block, with_rl=True)}
    given = [_overlay(d.name, d.overlay, d.brainstacks.router_datasets) for d in named if d.brainstacks.router_datasets]
    if args.mixed_datasets:
        given.append(_overlay(MIXED, {}, args.mixed_datasets))
    extra = {stage.name: stage for stage in load_domains(plan.raw, given, plan.block)}
    trained = {digest for stage in stages.values() for digest in _prompts(stage)}
    samples = []
    for source in [*domains, *([MIXED] if args.mixed_datasets else [])]:
        rows: Iterable[Example]
        if source in extra:
            rows = _drawn([extra[source].train_dataset, extra[source].eval_dataset], args.seed)
        elif source in stages:
            _check_split(library, stages[source])
            rows = _drawn([stages[source].eval_dataset], args.seed)
        else:
            rows = _kept(library, source)
        labels = () if source == MIXED else (source,)
        samples += [Sample(row, source, labels) for row in _held_out(rows, trained, args.samples, source)]
    return samples


def keep_rows(library: Library, samples: Sequence[Sample]) -> None:
    """Write the prompts to the library, for later runs whose YAML does not name their domains."""
    for source in dict.fromkeys(sample.source for sample in samples):
        library.write_file(_file(source), pack_rows([s.row for s in samples if s.source == source]))


def _file(source: str) -> str:
    return f"{FOLDER}/{source}.safetensors"


def _overlay(name: str, overlay: dict[str, Any], datasets: list[dict[str, Any]]) -> DomainArgs:
    """An entry of `domains` that loads `datasets` with the settings of the domain `name`, such as its chat template."""
    # Axolotl requires validation data. So half of the examples are declared to be, and `load_samples` reads both halves.
    ours = {"datasets": datasets, "val_set_size": 0.5, "sample_packing": False, "eval_sample_packing": False}
    kept = {key: value for key, value in overlay.items() if key != "test_datasets"}
    return DomainArgs.model_validate(kept | ours | {"name": name})


def _rows(dataset: Dataset) -> Iterator[Example]:
    """The examples that have an answer, of which only `_ROWS_AT_ONCE` are in memory at a time."""
    from axolotl_brainstacks.curriculum.stages import answer_rows

    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        part = dataset.select(range(start, min(start + _ROWS_AT_ONCE, len(dataset))))
        yield from answer_rows(part, _ROWS_AT_ONCE)


def _prompts(stage: DomainStage) -> Iterator[bytes]:
    """A digest of each prompt that the domain was trained on, in its supervised and its RL rounds."""
    yield from (_digest(prompt) for row in _rows(stage.train_dataset) if (prompt := row.prompt_ids))
    for rl_round in stage.rl_rounds:
        yield from _rl_prompts(rl_round)


def _rl_prompts(stage: Stage) -> Iterator[bytes]:
    """A digest of each prompt of an RL round, tokenised as the same prompt is in a supervised dataset.

    TRL's prompts are texts or messages. A supervised example may have the tokenizer's BOS token before the text or not, so a
    prompt has two digests, with and without it.
    """
    from axolotl.loaders import load_tokenizer

    tokenizer = load_tokenizer(stage.cfg)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for prompt in stage.train_dataset["prompt"]:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        yield from (_digest(ids), _digest(first + ids))


def _digest(prompt: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()


def _drawn(datasets: Sequence[Dataset], seed: int) -> Iterator[Example]:
    """The examples of the datasets that have an answer, in an order that depends on the seed only."""
    from datasets import concatenate_datasets

    # One shuffle of all examples: when `router.samples` is raised, the first ones stay the same and keep their measured losses.
    return _rows(concatenate_datasets(list(datasets)).shuffle(seed=seed))


def _check_split(library: Library, stage: DomainStage) -> None:
    """Warn if the validation examples differ from those at training time, as the domain may have been trained on these."""
    if answering(library, stage.name).validation is not None:
        measured = unpack_rows(library.validation_of(answering(library, stage.name)))
        count = min(len(measured), len(stage.rows))
        if stage.rows[:count] != measured[:count]:
            LOG.warning(
                "The validation rows of `%s` are not those that it was trained beside: data, `val_set_size` or the like have "
                "changed since, so it may have learned some of the router's prompts. Name rows that it has not seen in "
                "`brainstacks.router_datasets` of its entry",
                stage.name,
            )


def answering(library: Library, domain: str) -> DomainEntry:
    """The entry of the stacks that answer for a domain; while the domain is trained again, that of the old stacks."""
    entry = library.manifest.domain(domain)
    return entry.before or entry


def _kept(library: Library, domain: str) -> list[Example]:
    """The prompts of a domain that the last run kept, or else its validation examples in the library."""
    file = _file(domain)
    try:
        if (data := library.read_file(file)) is not None:
            return unpack_rows(data, library.path / file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}; or name `{domain}` with its `datasets:` under `brainstacks.domains`: its prompts are drawn from these"
        ) from error
    if (library.path / file).exists():
        LOG.warning("%s is not listed in the library's manifest and left alone: an older version wrote it", file)
    if answering(library, domain).validation is None:
        raise ValueError(
            f"Domain `{domain}` of {library.path} has no prompts to measure on: name it with its `datasets:` under "
            "`brainstacks.domains`"
        )
    return unpack_rows(library.validation_of(answering(library, domain)), f"the validation rows of {domain}")


def _held_out(rows: Iterable[Example], trained: set[bytes], limit: int, source: str) -> list[Example]:
    """The first `limit` distinct examples whose prompt is not in `trained`. Raises ValueError if there are none."""
    kept: dict[tuple[tuple[int, ...], tuple[int, ...]], Example] = {}
    seen = dropped = 0
    for row in rows:
        seen += 1
        if prompt := row.prompt_ids:
            if _digest(prompt) in trained:
                dropped += 1
            else:
                kept.setdefault((tuple(row.input_ids), tuple(row.labels)), row)
        if len(kept) == limit:
            break
    if dropped:
        LOG.warning("%d of %d held-out rows of `%s` left out: their prompts were trained on", dropped, seen, source)
    if not kept and dropped:
        raise ValueError(
            f"All {dropped} held-out prompts of `{source}` are among the training rows, and the router must not be made "
            f"from those: {more_rows(source)}"
        )
    if not kept:
        raise ValueError(
            f"The held-out rows of `{source}` have no row with a prompt before an answer, and the router learns from "
            "prompts: use a `type:` that tells them apart, such as `chat_template`"
        )
    return list(kept.values())


def more_rows(source: str) -> str:
    """The remedy for too few prompts, for an error."""
    if source == MIXED:
        return "name other rows in `brainstacks.router.mixed_datasets`"
    return (
        "name more rows in `brainstacks.router_datasets` of its entry under `brainstacks.domains`, or hold out more with "
        "`val_set_size` or `test_datasets`"
    )
