"""Makes a library's router: discovery, training, calibration, evaluation, saving."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from axolotl_brainstacks.distributed import is_main, on_main
from axolotl_brainstacks.evaluation import check_vocabulary
from axolotl_brainstacks.guarded import parse_json
from axolotl_brainstacks.library import Library, Manifest
from axolotl_brainstacks.library.entries import WEIGHTS as STACK_WEIGHTS
from axolotl_brainstacks.library.report import ROUTER_CHART, ROUTER_TABLES, write_report
from axolotl_brainstacks.library.storage import json_to_bytes
from axolotl_brainstacks.router.router import Router, RouterConfig
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import GateArgs, RouterArgs, ThresholdArgs
from axolotl_brainstacks.router_training.calibrate import calibrate, gate_losses
from axolotl_brainstacks.router_training.data import MIXED, Sample, keep_rows
from axolotl_brainstacks.router_training.discovery import DiscoveryResult, discover, row_key
from axolotl_brainstacks.router_training.evaluate import EvaluatedPrompt, summary
from axolotl_brainstacks.router_training.fit import Prompts, Score, fit, probabilities, target
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.report import Shown, chart, tables
from axolotl_brainstacks.router_training.search import DomainSet, Search
from axolotl_brainstacks.router_training.split import Part, count_parts, joined_in_parts, split, warn_of_few

LOG = logging.getLogger(__name__)

EVALUATION = "router/evaluation.json"
# Part of the digest of a router's inputs. A change of this number makes all existing routers count as out of date, for when the
# code measures differently.
VERSION = 3


def inputs_digest(library: Library, samples: Sequence[Sample], args: RouterArgs) -> str:
    """A digest of all that determines a router: the stacks, the prompts and the settings."""
    stacks = [[stack.name, stack.domain, stack.files[STACK_WEIGHTS].sha256] for stack in library.manifest.active_stacks]
    contexts = [[entry.name, *(entry.before or entry).context] for entry in library.manifest.domains]
    prompts = [[row_key(sample.row), sample.source, *sample.labels] for sample in samples]
    content = json.dumps([VERSION, stacks, contexts, prompts, args.model_dump(mode="json")])
    return hashlib.sha256(content.encode()).hexdigest()


def training_sets(manifest: Manifest, domains: Sequence[str]) -> dict[str, DomainSet]:
    """For each of `domains`, those of them that had a stack on while it was trained, itself included."""
    owner = {stack.name: stack.domain for stack in manifest.stacks}
    sets = {}
    for name in domains:
        entry = manifest.domain(name).before or manifest.domain(
            name
        )  # while it is trained again, the old stacks answer
        on = {name, *(owner.get(stack) for stack in entry.context)}
        sets[name] = tuple(domain for domain in domains if domain in on)
    return sets


def named_sets(labels: Sequence[str], trained_with: Mapping[str, DomainSet]) -> list[tuple[str, DomainSet]]:
    """The sets of domains that a prompt's labels suggest, with their names in `evaluate.CHOICES`.

    These are the labels themselves; all domains that any label was trained with; and for each label those it was trained with.

    Args:
        labels: the domains that the prompt was written for.
        trained_with: from `training_sets`.
    """
    if not labels:
        return []
    domains = list(trained_with)
    union = tuple(domain for domain in domains if any(domain in trained_with[label] for label in labels))
    own = tuple(domain for domain in domains if domain in labels)
    return [("own_label", own), ("trained_with", union), *(("trained_with", trained_with[label]) for label in labels)]


def made_before(library: Library, origin: str) -> dict[str, Any] | None:
    """The evaluation of the library's router, or None if the router must be made again.

    Args:
        library: that may have a router.
        origin: digest of the inputs, from `inputs_digest`, that the router must have been made from.
    """
    try:
        Router.load(library)
        data = library.read_file(EVALUATION)
        if data is None:
            return None
        evaluation: dict[str, Any] = parse_json(data, non_finite=True)
        Shown.model_validate(evaluation)
        return evaluation if evaluation["origin"] == origin else None
    except (ValueError, OSError, KeyError):
        return None


def make_router(library: Library, meter: LossMeter, samples: Sequence[Sample], args: RouterArgs) -> dict[str, Any]:
    """Make, evaluate and save the router. Every process must call this, while the main one holds the library's lock.

    Args:
        library: whose router is made.
        meter: of the model with the library.
        samples: held-out prompts, from `load_samples`.
        args: settings.

    Returns:
        The content of `router/evaluation.json`.

    Raises:
        ValueError: if a source has too few prompts, or a prompt has a token that the model does not know.
    """
    check_vocabulary((sample.row for sample in samples), meter.model, "The router's prompts")
    made_from = inputs_digest(library, samples, args)
    parts = split(samples, args)
    if not args.mixed_datasets:
        pairs, their_parts = joined_in_parts(samples, parts, args.mixed_pairs, args.seed)
        samples, parts = [*samples, *pairs], [*parts, *their_parts]
    counts = count_parts(samples, parts)
    for source, count in counts.items():
        LOG.info("Held-out prompts of `%s`: %s", source, ", ".join(f"{n} in {part}" for part, n in count.items()))
    if is_main():
        warn_of_few(counts)
    trained_with = training_sets(library.manifest, meter.domains)
    named = [named_sets(sample.labels, trained_with) for sample in samples]
    # By example, because equal examples of several sources are measured once, under the named sets of all.
    asked: dict[str, list[tuple[str, DomainSet]]] = {}
    for sample, sets in zip(samples, named, strict=True):
        asked.setdefault(row_key(sample.row), []).extend(sets)
    sources = {source: [s.row for s in samples if s.source == source] for source in counts}
    discovered = discover(library, meter, sources, args, asked)
    found = [item for items in discovered.values() for item in items]
    on_main(lambda: keep_rows(library, samples))

    LOG.info("Reading the base features of %d prompts", len(samples))
    features = meter.features([sample.row.prompt_ids for sample in samples], args.max_tokens)
    targets = torch.tensor(
        [target(f.losses, f.best, s.labels, meter.domains, args) for s, f in zip(samples, found, strict=True)]
    )

    def of_part[T](name: Part, items: Sequence[T]) -> list[T]:
        return [item for item, part in zip(items, parts, strict=True) if part == name]

    def prompts(name: Part) -> Prompts:
        return Prompts(of_part(name, features), targets[[part == name for part in parts]])

    router, epochs, validation, predicted = on_main(
        partial(_fitted, meter, prompts("train"), prompts("validation"), prompts("test"), args)
    )
    chosen, tried = calibrate(meter, of_part("validation", found), validation, args)
    router.config = router.config.model_copy(update={"gate": chosen})
    unseen = of_part("test", samples)
    judged = _judged(meter, unseen, of_part("test", found), of_part("test", named), predicted, chosen, args)
    context = {
        "score": {
            name: asdict(Score.of(predicted[rows], prompts("test").targets[rows]))
            for name in ("domains", "mixed")
            if (rows := [i for i, sample in enumerate(unseen) if (sample.source == MIXED) == (name == "mixed")])
        },
        "gate": chosen.model_dump(mode="json"),
        "calibration": tried,
        "epochs": [asdict(score) for score in epochs],
        "prompts": counts,
        "forwards": meter.forwards,
        "settings": args.model_dump(mode="json"),
        "origin": made_from,
    }
    has_floors = any(args.floors.get(domain) for domain in meter.domains)
    evaluation = summary(judged, samples, found, has_floors) | context

    def save() -> None:
        # The order makes a kill at any point safe. The old router goes first, so that it never stands beside the new evaluation;
        # the new router comes last, so that a router always has its evaluation and report. Otherwise the next run would take
        # what is incomplete for finished.
        library.set_router(None)
        library.write_file(EVALUATION, json_to_bytes(evaluation))
        library.write_file(ROUTER_CHART, chart(evaluation))
        library.write_file(ROUTER_TABLES, tables(evaluation).encode())
        write_report(library)
        router.save(library)

    on_main(save)
    return evaluation


def _fitted(
    meter: LossMeter, train: Prompts, validation: Prompts, test: Prompts, args: RouterArgs
) -> tuple[Router, list[Score], Tensor, Tensor]:
    """Train a router.

    Returns:
        The router, on the CPU; the scores of its epochs; its probabilities (prompts, domains) for the validation part and for the
        test part.
    """
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
    for_validation = probabilities(router, validation, args.batch_size, device)
    for_test = probabilities(router, test, args.batch_size, device)
    router.network.cpu()
    return router, epochs, for_validation, for_test


def _judged(
    meter: LossMeter,
    samples: Sequence[Sample],
    found: Sequence[DiscoveryResult],
    named: Sequence[Sequence[tuple[str, DomainSet]]],
    predicted: Tensor,
    chosen: GateArgs,
    args: RouterArgs,
) -> list[EvaluatedPrompt]:
    """Measure the unseen prompts under all `evaluate.CHOICES`. Every process must call this.

    Args:
        meter: measures the losses.
        samples: the unseen prompts.
        found: their discovery results.
        named: the sets that their labels suggest.
        predicted: (prompts, domains), the router's probabilities.
        chosen: the calibrated settings.
        args: the configured ones.
    """
    soft, hard, router = gate_losses(meter, found, predicted, [args.gate("soft"), args.gate("hard"), chosen])
    uncovered = gate(predicted, meter.domains, chosen)[1].tolist()
    search = Search.of(meter.domains, args)
    judged = []
    for number, (sample, item) in enumerate(zip(samples, found, strict=True)):
        assert item.base is not None
        # `discovered` is the best of all sets that were measured, and the router may choose one that the search did not ask for.
        measured = {item.best: item.losses[item.best], _passed(predicted[number], meter, args): hard[number]}
        if chosen.weights == "hard":
            measured[_passed(predicted[number], meter, chosen)] = router[number]
        # Several sets are called `trained_with`. The first is that of all labels together; reversed, it overwrites the others.
        sets = dict(reversed(named[number]))
        losses = {"base": item.base, "ungated": item.losses[tuple(meter.domains)]}
        losses |= {name: item.losses[domain_set] for name, domain_set in sets.items()}
        losses |= {"soft": soft[number], "hard": hard[number], "router": router[number]}
        losses["discovered"] = measured[min(measured, key=lambda domain_set: search.cost(measured, domain_set))]
        judged.append(EvaluatedPrompt(sample, losses, uncovered[number]))
    return judged


def _passed(probabilities: Tensor, meter: LossMeter, args: ThresholdArgs) -> DomainSet:
    """The set of domains whose probability reaches the threshold, for a prompt's probabilities (domains,)."""
    passed = (probabilities >= args.gate_threshold).tolist()
    return tuple(domain for domain, on in zip(meter.domains, passed, strict=True) if on)
