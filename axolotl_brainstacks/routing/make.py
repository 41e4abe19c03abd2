"""Makes a library's router: discovers targets, fits the network, measures what its choices cost, saves."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from axolotl_brainstacks.args import RouterArgs
from axolotl_brainstacks.distributed import on_main
from axolotl_brainstacks.library import WEIGHTS as STACK_WEIGHTS
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.report import ROUTER_CHART, write_report
from axolotl_brainstacks.routing.data import MIXED, Part, Sample, joined, keep_rows, split
from axolotl_brainstacks.routing.discovery import discover, row_key
from axolotl_brainstacks.routing.evaluate import Judged, summary
from axolotl_brainstacks.routing.fit import Prompts, Score, fit, probabilities, target
from axolotl_brainstacks.routing.gate import gate
from axolotl_brainstacks.routing.measure import Meter
from axolotl_brainstacks.routing.report import chart
from axolotl_brainstacks.routing.router import Router, RouterConfig
from axolotl_brainstacks.storage import json_to_bytes

LOG = logging.getLogger(__name__)

EVALUATION = "router/evaluation.json"


def origin(library: Library, samples: Sequence[Sample], args: RouterArgs) -> str:
    """A digest of all that a router follows from: the stacks, the prompts, the settings."""
    stacks = [[stack.name, stack.domain, stack.files[STACK_WEIGHTS].sha256] for stack in library.manifest.active_stacks]
    prompts = [[row_key(sample.row), sample.source, *sample.labels] for sample in samples]
    content = json.dumps([stacks, prompts, args.model_dump(mode="json")])
    return hashlib.sha256(content.encode()).hexdigest()


def made_before(library: Library, origin: str) -> dict[str, Any] | None:
    """The evaluation of the library's router if it is whole and has this origin."""
    try:
        Router.load(library)
        evaluation: dict[str, Any] = json.loads((library.path / EVALUATION).read_text())
        return evaluation if evaluation["origin"] == origin else None
    except (ValueError, OSError, KeyError, TypeError):
        return None


def make_router(library: Library, meter: Meter, samples: Sequence[Sample], args: RouterArgs) -> dict[str, Any]:
    """Discover, fit, evaluate and save; on every rank, while the main one is writing the library.

    Returns:
        The content of `router/evaluation.json`.
    """
    made_from = origin(library, samples, args)
    parts = split(samples, args)
    unseen = [sample for sample, part in zip(samples, parts, strict=True) if part == "test"]
    pairs = [] if args.mixed_datasets else joined(unseen, args.mixed_pairs, args.seed)
    samples, unseen = [*samples, *pairs], [*unseen, *pairs]
    parts += ["test"] * len(pairs)
    sources = {
        source: [s.row for s in samples if s.source == source] for source in dict.fromkeys(s.source for s in samples)
    }
    compared = {
        row_key(s.row): [tuple(meter.domains), tuple(d for d in meter.domains if d in s.labels)] for s in unseen
    }
    discovered = discover(library, meter, sources, args, compared)
    on_main(lambda: keep_rows(library, samples))

    LOG.info("Reading the base features of %d prompts", len(samples))
    features = meter.features([sample.row.prompt_ids for sample in samples], args.max_tokens)
    found = [item for items in discovered.values() for item in items]
    targets = torch.tensor(
        [target(f.losses, f.best, s.labels, meter.domains, args) for s, f in zip(samples, found, strict=True)]
    )

    def part(name: Part) -> Prompts:
        chosen = [i for i, other in enumerate(parts) if other == name]
        return Prompts([features[i] for i in chosen], targets[chosen])

    router, epochs, predicted = on_main(partial(_fitted, meter, part("train"), part("validation"), part("test"), args))
    weights, uncovered = gate(predicted, meter.domains, args.gate())
    losses = meter.losses([sample.row for sample in unseen], weights)
    unseen_found = [item for item, other in zip(found, parts, strict=True) if other == "test"]
    judged = [
        Judged(sample, item, loss, bool(flag))
        for sample, item, loss, flag in zip(unseen, unseen_found, losses, uncovered, strict=True)
    ]
    context = {
        "score": {
            name: asdict(Score.of(predicted[rows], part("test").targets[rows]))
            for name in ("domains", "mixed")
            if (rows := [i for i, sample in enumerate(unseen) if (sample.source == MIXED) == (name == "mixed")])
        },
        "epochs": [asdict(score) for score in epochs],
        "prompts": dict(Counter(parts)),
        "forwards": meter.forwards,
        "settings": args.model_dump(mode="json"),
        "origin": made_from,
    }
    evaluation = summary(judged, discovered, meter.domains) | context

    def save() -> None:
        library.write_file(EVALUATION, json_to_bytes(evaluation))
        library.write_file(ROUTER_CHART, chart(evaluation))
        router.save(library)
        write_report(library)

    on_main(save)
    return evaluation


def _fitted(
    meter: Meter, train: Prompts, validation: Prompts, test: Prompts, args: RouterArgs
) -> tuple[Router, list[Score], Tensor]:
    device = next(meter.model.parameters()).device
    config = RouterConfig(
        domains=meter.domains,
        features=train.features[0].shape[-1],
        width=args.width,
        dropout=args.dropout,
        max_tokens=args.max_tokens,
        gate=args.gate(),
    )
    router = Router.fresh(config, args.seed)
    epochs = fit(router, train, validation, args, device)
    predicted = probabilities(router, test, args.batch_size, device)
    router.network.cpu()
    return router, epochs, predicted
