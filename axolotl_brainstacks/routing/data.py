"""The prompts that the router is made from: where they come from, and how they are split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError

from axolotl_brainstacks.args import DomainArgs, RouterArgs
from axolotl_brainstacks.evaluation import Row, pack_rows, unpack_rows
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.routing.discovery import FOLDER

if TYPE_CHECKING:
    from axolotl_brainstacks.curriculum.plan import Plan
    from axolotl_brainstacks.curriculum.stages import DomainStage

# No domain can be called so: their names start with a letter.
MIXED = "_mixed"
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Sample:
    """A prompt with its answer. `labels`: the domains it was written for; none when that is not known."""

    row: Row
    source: str
    labels: tuple[str, ...]


def load_samples(plan: Plan, library: Library, domains: Sequence[str]) -> list[Sample]:
    """Up to `samples` prompts of every domain, and of `mixed_datasets`.

    A domain's prompts are drawn from its datasets in the YAML; for a domain that the YAML does not name they are those
    of the last run, or else its validation rows in the library.

    Raises:
        ValueError: if a domain has no prompts, or none with an answer.
    """
    from axolotl_brainstacks.curriculum.stages import load_domains

    args = plan.block.router
    named = [domain for domain in plan.block.curriculum if domain.name in domains]
    mixed = [DomainArgs.model_validate({"name": MIXED, "datasets": args.mixed_datasets})] if args.mixed_datasets else []
    stages = {stage.name: stage for stage in load_domains(plan.raw, [*named, *mixed], plan.block)}
    samples = []
    for source in [*domains, *(stage.name for stage in mixed)]:
        rows = _drawn(stages[source], args) if source in stages else _kept(library, source)[: args.samples]
        labels = () if source == MIXED else (source,)
        samples += [Sample(row, source, labels) for row in rows]
    return samples


def keep_rows(library: Library, samples: Sequence[Sample]) -> None:
    """Keep the tokens of the samples beside what is measured on them, for runs whose YAML does not name their domain."""
    for source in dict.fromkeys(sample.source for sample in samples):
        library.write_file(_file(source), pack_rows([s.row for s in samples if s.source == source]))


def _file(source: str) -> str:
    return f"{FOLDER}/{source}.safetensors"


def _drawn(stage: DomainStage, args: RouterArgs) -> list[Row]:
    from axolotl_brainstacks.curriculum.stages import answer_rows

    # Shuffled once over the whole: with more `samples` the first ones stay the same, and what was measured is kept.
    rows = answer_rows(stage.train_dataset.shuffle(seed=args.seed), args.samples)
    return _with_prompts(rows, f"The datasets of `{stage.name}`")


def _kept(library: Library, domain: str) -> list[Row]:
    path = library.path / _file(domain)
    if path.exists():
        try:
            return unpack_rows(path.read_bytes())
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): name `{domain}` with its `datasets:` under `brainstacks.domains`, or delete "
                "the file, and the domain's validation rows are used"
            ) from error
    if library.manifest.domain(domain).validation is None:
        raise ValueError(
            f"Domain `{domain}` of {library.path} has no prompts to measure on: name it with its `datasets:` under "
            "`brainstacks.domains`"
        )
    return _with_prompts(unpack_rows(library.validation(domain)), f"The validation rows of `{domain}`")


def _with_prompts(rows: Sequence[Row], owner: str) -> list[Row]:
    rows = list({(tuple(r.input_ids), tuple(r.labels)): r for r in rows if r.prompt_ids}.values())
    if not rows:
        raise ValueError(
            f"{owner} have no row with a prompt before an answer, and the router learns from prompts: use a `type:` that "
            "tells them apart, such as `chat_template`"
        )
    return rows


def split(samples: Sequence[Sample], args: RouterArgs) -> list[Part]:
    """The part each sample belongs to. A prompt goes to one part with all of its answers, whichever sources it is in.

    Raises:
        ValueError: if a source has too few prompts for each part to get one.
    """
    parts: dict[tuple[int, ...], Part] = {}
    for source in dict.fromkeys(sample.source for sample in samples):
        prompts = list(dict.fromkeys(tuple(s.row.prompt_ids) for s in samples if s.source == source))
        Random(f"{args.seed} {source}").shuffle(prompts)
        test, validation = (max(1, round(share * len(prompts))) for share in (args.test_share, args.validation_share))
        for number, prompt in enumerate(prompts):
            part: Part = "test" if number < test else "validation" if number < test + validation else "train"
            parts.setdefault(prompt, part)
        found = Counter(parts[prompt] for prompt in prompts)
        if len(found) < 3:
            raise ValueError(
                f"{source} has {len(prompts)} different prompts, too few to be split into training, validation and test "
                "parts: give it more rows, or raise `brainstacks.router.samples`"
            )
    return [parts[tuple(sample.row.prompt_ids)] for sample in samples]


def joined(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
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
        row = Row(
            a.prompt_ids + b.prompt_ids + a.input_ids[i:] + b.input_ids[j:],
            a.labels[:i] + b.labels[:j] + a.labels[i:] + b.labels[j:],
        )
        pairs.append(Sample(row, MIXED, first.labels + second.labels))
    return pairs
