"""What `axolotl brainstacks-router` does: load, discover, fit, evaluate, save. Run as a module by a launcher."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from axolotl.integrations.base import PluginManager
from axolotl.utils.logging import get_logger
from rich.console import Console
from torch import Tensor

from axolotl_brainstacks.args import BrainstacksBlock, RouterArgs
from axolotl_brainstacks.curriculum.build import tuner
from axolotl_brainstacks.distributed import is_main, on_main
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.plugin import BrainstacksPlugin
from axolotl_brainstacks.routing import report
from axolotl_brainstacks.routing.data import MIXED, Part, Sample, joined, keep_rows, load_samples, split
from axolotl_brainstacks.routing.discovery import discover, row_key
from axolotl_brainstacks.routing.evaluate import Judged, summary
from axolotl_brainstacks.routing.fit import Prompts, Score, fit, probabilities, target
from axolotl_brainstacks.routing.gate import gate
from axolotl_brainstacks.routing.measure import Meter
from axolotl_brainstacks.routing.router import Router, RouterConfig, routable_domains
from axolotl_brainstacks.storage import json_to_bytes

LOG = get_logger(__name__)

EVALUATION = "router/evaluation.json"
CHART = "report/router.png"


def run(config: str) -> None:
    """Make the router of the library that the YAML `config` names. On every rank.

    Raises:
        ValueError: for anything in the config, the library or the data that the user has to mend.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.cli.utils import load_model_and_tokenizer

    cfg = load_cfg(config, inference=True, rl=None)
    plan = next(
        (p.plan for p in PluginManager.get_instance().plugins.values() if isinstance(p, BrainstacksPlugin)), None
    )
    if plan is None:
        raise ValueError(f"{config} does not say `adapter: brainstacks`: a router belongs to a library of stacks")
    library = Library.open(plan.library_path)
    domains = checked_domains(library, plan.block)
    samples = load_samples(plan, library, domains)
    split(samples, plan.block.router)
    model, _, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    meter = Meter(model, tuner(model), domains, library.manifest.stacks, cfg.eval_batch_size or cfg.micro_batch_size)
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(library.writing()) and None)
        evaluation = make_router(library, meter, samples, plan.block.router)
    if is_main():
        report.show(evaluation, Console())
        print(f"The router of {library.path} is saved; figures in {EVALUATION} and {CHART}")


def checked_domains(library: Library, block: BrainstacksBlock) -> list[str]:
    """The domains to route among. Raises ValueError when there are none, or a setting names one that does not exist."""
    domains = routable_domains(library.manifest)
    if not domains:
        raise ValueError(
            f"{library.path} has no finished domain with a stack, so there is nothing to route among: run `axolotl train`"
        )
    known = [entry.name for entry in library.manifest.domains]
    known += [domain.name for domain in block.curriculum if domain.name not in known]
    for key, names in (("floors", list(block.router.floors)), ("soft_domains", block.router.soft_domains)):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"brainstacks.router.{key} names `{name}`, but the domains are {', '.join(known)}: correct the name"
                )
    return domains


def make_router(library: Library, meter: Meter, samples: Sequence[Sample], args: RouterArgs) -> dict[str, Any]:
    """Discover, fit, evaluate and save; on every rank, while the main one is writing the library.

    Returns:
        The content of `router/evaluation.json`.
    """
    parts = split(samples, args)
    unseen = [sample for sample, part in zip(samples, parts, strict=True) if part == "test"]
    pairs = [] if args.mixed_datasets else joined(unseen, args.mixed_pairs, args.seed)
    samples, unseen = [*samples, *pairs], [*unseen, *pairs]
    parts += ["test"] * len(pairs)
    on_main(lambda: keep_rows(library, samples))

    LOG.info("Reading the base features of %d prompts", len(samples))
    features = meter.features([sample.row.prompt_ids for sample in samples], args.max_tokens)
    sources = {
        source: [s.row for s in samples if s.source == source] for source in dict.fromkeys(s.source for s in samples)
    }
    compared = {
        row_key(s.row): [tuple(meter.domains), tuple(d for d in meter.domains if d in s.labels)] for s in unseen
    }
    discovered = discover(library, meter, sources, args, compared)
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
    }
    evaluation = summary(judged, discovered, meter.domains) | context

    def save() -> None:
        library.write_file(EVALUATION, json_to_bytes(evaluation))
        library.write_file(CHART, report.chart(evaluation))
        router.save(library)

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


def main() -> None:
    """Entry of a launched worker; user errors end in one line."""
    from axolotl.utils.distributed import cleanup_distributed

    try:
        run(sys.argv[1])
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        cleanup_distributed()


if __name__ == "__main__":
    main()
