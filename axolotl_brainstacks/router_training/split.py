"""How the held-out prompts are split into training, validation and test parts, and joined into prompts of two domains."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Literal, get_args

from axolotl_brainstacks.evaluation import Example
from axolotl_brainstacks.router_args import RouterArgs
from axolotl_brainstacks.router_training.data import MIXED, Sample, more_rows

LOG = logging.getLogger(__name__)

Part = Literal["train", "validation", "test"]
# Fewer prompts in a domain's test part are worth a warning.
_FEW = 10
PARTS: tuple[Part, ...] = get_args(Part)


def split(samples: Sequence[Sample], args: RouterArgs) -> list[Part]:
    """Split the samples into training, validation and test parts.

    All samples with the same prompt go to the same part, also those of different sources: a test prompt must be unseen.

    Returns:
        The part of each sample.

    Raises:
        ValueError: if a source has too few distinct prompts to give each part one.
    """
    parts: dict[tuple[int, ...], Part] = {}
    for source in dict.fromkeys(sample.source for sample in samples):
        prompts = list(dict.fromkeys(tuple(s.row.prompt_ids) for s in samples if s.source == source))
        Random(f"{args.seed} {source}").shuffle(prompts)
        found = Counter(parts[prompt] for prompt in prompts if prompt in parts)  # an earlier source has them too
        shares: dict[Part, float] = {"test": args.test_share, "validation": args.validation_share}
        wanted = {part: max(1, round(share * len(prompts))) for part, share in shares.items()}
        for prompt in prompts:
            if prompt not in parts:
                parts[prompt] = next((part for part, count in wanted.items() if found[part] < count), "train")
                found[parts[prompt]] += 1
        if not all(found[part] for part in PARTS):
            raise ValueError(
                f"`{source}` has {len(prompts)} different held-out prompts, too few to be split into training, validation "
                f"and test parts (`brainstacks.router.samples` allows {args.samples} rows): {more_rows(source)}"
            )
    return [parts[tuple(sample.row.prompt_ids)] for sample in samples]


def count_parts(samples: Sequence[Sample], parts: Sequence[Part]) -> dict[str, dict[str, int]]:
    """By source and part, the number of samples."""
    counts = Counter((sample.source, part) for sample, part in zip(samples, parts, strict=True))
    sources = dict.fromkeys(sample.source for sample in samples)
    return {source: {part: counts[source, part] for part in PARTS} for source in sources}


def warn_of_few(counts: dict[str, dict[str, int]]) -> None:
    """Log one warning if a domain has so few test prompts that its figures are mostly chance."""
    few = {source: count["test"] for source, count in counts.items() if source != MIXED and count["test"] < _FEW}
    if few:
        LOG.warning(
            "Few test prompts, so the router's figures may be chance: %s; at least %d of each domain are advisable: raise "
            "`brainstacks.router.samples`, or give more held-out rows in `router_datasets`",
            *(", ".join(f"{source} has {count}" for source, count in few.items()), _FEW),
        )


def joined_in_parts(
    samples: Sequence[Sample], parts: Sequence[Part], count: int, seed: int
) -> tuple[list[Sample], list[Part]]:
    """Join prompts within each part, in numbers proportional to the parts' sizes.

    Args:
        samples: single-domain samples.
        parts: the part of each.
        count: joined prompts of all parts together.
        seed: of the choice of prompts.

    Returns:
        The joined samples, and the part of each, which is that of both prompts it consists of.
    """
    sizes = Counter(parts)
    exact = {part: count * sizes[part] / len(parts) for part in PARTS}
    shares = {part: int(exact[part]) for part in PARTS}
    # Rounded down so far; the parts with the largest remainders get one more each, until the sum is `count`.
    for part in sorted(PARTS, key=lambda part: shares[part] - exact[part])[: count - sum(shares.values())]:
        shares[part] += 1
    joined_samples: list[Sample] = []
    their_parts: list[Part] = []
    for part, share in shares.items():
        of_part = [sample for sample, other in zip(samples, parts, strict=True) if other == part]
        pairs = joined(of_part, share, f"{seed} {part}")
        joined_samples += pairs
        their_parts += [part] * len(pairs)
    return joined_samples, their_parts


def joined(samples: Sequence[Sample], count: int, seed: int | str) -> list[Sample]:
    """Join random pairs of samples of two domains into one each: both prompts, then both answers.

    Args:
        samples: single-domain samples; others are ignored.
        count: pairs to make; none are made with fewer than two domains.
        seed: of the choice.
    """
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
