"""The prompts that the router is made from: held-out ones, where they come from, and how they are split."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args

from axolotl_brainstacks.args import DomainArgs, RouterArgs
from axolotl_brainstacks.evaluation import Example, pack_rows, unpack_rows
from axolotl_brainstacks.library import DomainEntry, Library

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl_brainstacks.curriculum.plan import Plan
    from axolotl_brainstacks.curriculum.stages import DomainStage, Stage

LOG = logging.getLogger(__name__)

# Earlier versions kept prompts elsewhere, drawn from training rows: those are not read.
FOLDER = "router/prompts"
# No domain can be called so: their names start with a letter.
MIXED = "_mixed"
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Sample:
    """A prompt with its answer. `labels`: the domains it was written for; none when that is not known."""

    row: Example
    source: str
    labels: tuple[str, ...]


def load_samples(plan: Plan, library: Library, domains: Sequence[str]) -> list[Sample]:
    """Up to `samples` held-out prompts of every domain, and of `mixed_datasets`.

    A domain's prompts are drawn from its `router_datasets` in the YAML, or else from its validation data there; for a
    domain that the YAML does not name they are those of the last run, or else its validation rows in the library. A
    prompt that a domain of the YAML was trained on is left out, wherever it comes from.

    Raises:
        ValueError: if a domain has no held-out prompts, or none with an answer.
    """
    from axolotl_brainstacks.curriculum.stages import load_domains

    args = plan.block.router
    named = [domain for domain in plan.block.curriculum if domain.name in domains]
    stages = {stage.name: stage for stage in load_domains(plan.raw, named, plan.block, with_rl=True)}
    given = [_overlay(d.name, d.overlay, d.brainstacks.router_datasets) for d in named if d.brainstacks.router_datasets]
    if args.mixed_datasets:
        given.append(_overlay(MIXED, {}, args.mixed_datasets))
    extra = {stage.name: stage for stage in load_domains(plan.raw, given, plan.block)}
    trained = {prompt for stage in stages.values() for prompt in _prompts(stage)}
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
    """Keep the tokens of the samples, for runs whose YAML does not name their domain."""
    for source in dict.fromkeys(sample.source for sample in samples):
        library.write_file(_file(source), pack_rows([s.row for s in samples if s.source == source]))


def _file(source: str) -> str:
    return f"{FOLDER}/{source}.safetensors"


def _overlay(name: str, overlay: dict[str, Any], datasets: list[dict[str, Any]]) -> DomainArgs:
    """An entry whose data is `datasets`, read as the training data of the domain is.

    Axolotl wants validation rows of every stage: half of the data plays that part, and both halves are used.
    """
    ours = {"datasets": datasets, "val_set_size": 0.5, "sample_packing": False, "eval_sample_packing": False}
    kept = {key: value for key, value in overlay.items() if key != "test_datasets"}
    return DomainArgs.model_validate(kept | ours | {"name": name})


def _rows(dataset: Dataset) -> Iterator[Example]:
    """The rows with an answer; only some are in memory at a time."""
    from axolotl_brainstacks.curriculum.stages import answer_rows

    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        part = dataset.select(range(start, min(start + _ROWS_AT_ONCE, len(dataset))))
        yield from answer_rows(part, _ROWS_AT_ONCE)


def _prompts(stage: DomainStage) -> Iterator[bytes]:
    """A digest of each prompt that the domain trains on, in RL rounds too."""
    yield from (_digest(prompt) for row in _rows(stage.train_dataset) if (prompt := row.prompt_ids))
    for rl_round in stage.rl_rounds:
        yield from _rl_prompts(rl_round)


def _rl_prompts(stage: Stage) -> Iterator[bytes]:
    """As `_prompts`. TRL reads texts and messages; a supervised row has the tokenizer's first token before a text."""
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
    from datasets import concatenate_datasets

    # Shuffled once over the whole: with more `samples` the first ones stay the same, and what was measured is kept.
    return _rows(concatenate_datasets(list(datasets)).shuffle(seed=seed))


def _check_split(library: Library, stage: DomainStage) -> None:
    """Warn when the validation rows are other ones than while the domain was trained: it may have learned these."""
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
    """The entry of the stacks that answer for a domain: while it is trained again, the old one."""
    entry = library.manifest.domain(domain)
    return entry.before or entry


def _kept(library: Library, domain: str) -> list[Example]:
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
    """The first different rows whose prompt is not in `trained`."""
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
            f"from those: {_more_rows(source)}"
        )
    if not kept:
        raise ValueError(
            f"The held-out rows of `{source}` have no row with a prompt before an answer, and the router learns from "
            "prompts: use a `type:` that tells them apart, such as `chat_template`"
        )
    return list(kept.values())


def _more_rows(source: str) -> str:
    if source == MIXED:
        return "name other rows in `brainstacks.router.mixed_datasets`"
    return (
        "name more rows in `brainstacks.router_datasets` of its entry under `brainstacks.domains`, or hold out more with "
        "`val_set_size` or `test_datasets`"
    )


def split(samples: Sequence[Sample], args: RouterArgs) -> list[Part]:
    """The part each sample belongs to. A prompt goes to one part with all of its answers, whichever sources it is in.

    Raises:
        ValueError: if a source has too few prompts for each part to get one.
    """
    parts: dict[tuple[int, ...], Part] = {}
    for source in dict.fromkeys(sample.source for sample in samples):
        prompts = list(dict.fromkeys(tuple(s.row.prompt_ids) for s in samples if s.source == source))
        Random(f"{args.seed} {source}").shuffle(prompts)
        found = Counter(parts[prompt] for prompt in prompts if prompt in parts)  # shared with an earlier source
        shares: dict[Part, float] = {"test": args.test_share, "validation": args.validation_share}
        wanted = {part: max(1, round(share * len(prompts))) for part, share in shares.items()}
        for prompt in prompts:
            if prompt not in parts:
                parts[prompt] = next((part for part, count in wanted.items() if found[part] < count), "train")
                found[parts[prompt]] += 1
        if not all(found[part] for part in PARTS):
            raise ValueError(
                f"`{source}` has {len(prompts)} different held-out prompts, too few to be split into training, validation "
                f"and test parts (`brainstacks.router.samples` allows {args.samples} rows): {_more_rows(source)}"
            )
    return [parts[tuple(sample.row.prompt_ids)] for sample in samples]


def count_parts(samples: Sequence[Sample], parts: Sequence[Part]) -> dict[str, dict[str, int]]:
    """By source, how many samples are in each part."""
    counts = Counter((sample.source, part) for sample, part in zip(samples, parts, strict=True))
    sources = dict.fromkeys(sample.source for sample in samples)
    return {source: {part: counts[source, part] for part in PARTS} for source in sources}


def joined_in_parts(
    samples: Sequence[Sample], parts: Sequence[Part], count: int, seed: int
) -> tuple[list[Sample], list[Part]]:
    """`count` joined prompts in all, and the part of each: that of both prompts it is made of. A part gets as many as it
    has samples, in proportion."""
    sizes = Counter(parts)
    exact = {part: count * sizes[part] / len(parts) for part in PARTS}
    shares = {part: int(exact[part]) for part in PARTS}
    for part in sorted(PARTS, key=lambda part: shares[part] - exact[part])[: count - sum(shares.values())]:
        shares[part] += 1  # largest remainders first
    pairs = {
        part: joined([s for s, other in zip(samples, parts, strict=True) if other == part], share, f"{seed} {part}")
        for part, share in shares.items()
    }
    return [s for of_part in pairs.values() for s in of_part], [part for part in PARTS for _ in pairs[part]]


def joined(samples: Sequence[Sample], count: int, seed: int | str) -> list[Sample]:
    """Prompts of two domains: both questions, then both answers. Made from single-domain samples."""
    rng = Random(seed)
    by_domain = {s.source: [t for t in samples if t.source == s.source] for s in samples if s.labels}
    if len(by_domain) < 2:
        return []
    pairs = []
    for _ in range(count):
        first, second = (rng.choice(by_domain[domain]) for domain in rng.sample(list(by_domain), 2))
        a, b = first.row, second.row
        i, j = len(a.prompt_ids), len(b.prompt_ids)
        row = Example(
            a.prompt_ids + b.prompt_ids + a.input_ids[i:] + b.input_ids[j:],
            a.labels[:i] + b.labels[:j] + a.labels[i:] + b.labels[j:],
        )
        pairs.append(Sample(row, MIXED, first.labels + second.labels))
    return pairs
