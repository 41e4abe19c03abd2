"""Routing and answering, the functions behind the methods of `BrainstacksModel`.

A prompt is read by the base model alone; the router turns the hidden states into a weight per domain; each row of the batch is
then answered by the base model's own `generate` with its domains' stacks.

Which stacks are on is state of the model, so an answer holds the model's lock. When it ends, also by an exception, one
assignment restores the previous selection, and nothing else has to be undone.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from axolotl_brainstacks.evaluation import IGNORED
from axolotl_brainstacks.guarded import printable
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.features import base_features, pad_right
from axolotl_brainstacks.router.router import Router, spread
from axolotl_brainstacks.serving.library_tuner import LibraryTuner

LOG = logging.getLogger(__name__)

Domains = Mapping[str, float] | Sequence[Mapping[str, float]]

# Attribute of a KV cache: the stacks and weights that its tokens were computed with; None while an answer fills it.
_READ_WITH = "brainstacks_read_with"


@dataclass(frozen=True)
class PromptRoute:
    """The domains that a prompt is answered with.

    Attributes:
        weights: factor of each domain's stacks, largest first, without the domains that are off.
        uncovered: whether no domain's probability reached the threshold; floors may still give domains a weight.
    """

    weights: dict[str, float]
    uncovered: bool = False

    def __str__(self) -> str:
        on = ", ".join(f"{printable(domain)} {weight:.2f}" for domain, weight in self.weights.items()) or "base model"
        return f"{on} (uncovered)" if self.uncovered else on


def route(
    tuner: LibraryTuner,
    prompts: Tensor | Sequence[str],
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> list[PromptRoute]:
    """`BrainstacksModel.route`.

    Raises:
        ValueError: if the library has no router, the router is stale, or the library has changed since it was loaded; if a
            prompt is empty, or texts come without a tokenizer.
    """
    with tuner.lock:
        return _route(tuner, _router(tuner), prompts, attention_mask, tokenizer)


def _route(
    tuner: LibraryTuner,
    router: Router,
    prompts: Tensor | Sequence[str],
    attention_mask: Tensor | None,
    tokenizer: Any,
) -> list[PromptRoute]:
    device = tuner.model.get_input_embeddings().weight.device
    if isinstance(prompts, Tensor):
        ids = prompts
        mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
    else:
        if tokenizer is None:
            raise ValueError("`prompts` are texts, and there is no tokenizer to read them: give `tokenizer=`")
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids, mask = pad_right([torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts])
    if empty := mask.any(1).logical_not().nonzero().flatten().tolist():
        raise ValueError(f"Prompt {empty[0]} is empty, so there is nothing to route on: name stacks with `domains=`")
    found = router.route(*base_features(tuner, tuner, ids.to(device), mask.to(device), router.config.max_tokens))
    routes = []
    for weights, uncovered in zip(found.weights.tolist(), found.uncovered.tolist(), strict=True):
        on = sorted(zip(router.domains, weights, strict=True), key=lambda item: -item[1])
        routes.append(PromptRoute({domain: weight for domain, weight in on if weight}, uncovered))
    return routes


def routes_for(
    tuner: LibraryTuner,
    prompts: Tensor | Sequence[str] | None,
    attention_mask: Tensor | None,
    tokenizer: Any,
    domains: Domains | None,
) -> list[PromptRoute]:
    """The routes that `domains` names, or the router's if it is None.

    Returns:
        One route per prompt or per mapping in `domains`.

    Raises:
        ValueError: as `route`; also unless `domains` consists of mappings from a known domain to a finite weight.
    """
    if domains is None:
        assert prompts is not None, "give prompts to route, or domains"
        return route(tuner, prompts, attention_mask, tokenizer)
    known = _domains(tuner)
    rows = [domains] if isinstance(domains, Mapping) else list(domains)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"`domains` is {domains!r}; it must be a mapping such as {{'math': 1.0}}, or one for each prompt"
        )
    for name, weight in (item for row in rows for item in row.items()):
        if name not in known:
            raise ValueError(
                f"`domains` names `{name}`, but there are stacks of {', '.join(known) or 'no domain'} only"
            )
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"`domains` gives `{name}` the weight {weight!r}; it must be a finite number")
    return [PromptRoute(dict(row)) for row in rows]


def load_router(tuner: LibraryTuner) -> None:
    """Load the router now if `generate` will need it, so that a router that cannot be used is an error before the first prompt.

    Raises:
        ValueError: as `route`.
    """
    with tuner.lock:
        if _routes_by_itself(tuner):
            _router(tuner)


def stack_weights(tuner: LibraryTuner, routes: Sequence[PromptRoute]) -> tuple[list[str], Tensor]:
    """The arguments of `use_stacks` for these routes: the stacks that any of them needs, and weights (routes, stacks)."""
    domains = _domains(tuner)
    weights = [[row.weights.get(domain, 0.0) for domain in domains] for row in routes]
    return spread(torch.tensor(weights).reshape(len(routes), len(domains)), domains, tuner.stacks)


def generate(tuner: LibraryTuner, *args: Any, domains: Domains | None = None, **kwargs: Any) -> Any:
    """`BrainstacksModel.generate`."""
    with tuner.lock:
        if domains is None and not _routes_by_itself(tuner):
            return _answer(tuner, args, kwargs)
        before = tuner.selection.wanted
        shown = kwargs.get("streamer") if tuner.show_routes else None
        try:
            routes = _one_route_each(tuner, args, kwargs, domains)
            for number, row in enumerate(routes):
                LOG.info("Prompt %d: %s", number, row)
            if shown is not None:
                shown.on_finalized_text(f"[{routes[0]}]\n")
            tuner.use_stacks(*stack_weights(tuner, routes))
            return _answer(tuner, args, kwargs)
        except BaseException as error:
            if shown is not None:
                # A web page that shows the answer as it is generated waits for the stream's end, which must come here too.
                text = printable(str(error)) or type(error).__name__
                shown.on_finalized_text(f"Error: {text}", stream_end=True)
            raise
        finally:
            tuner.selection.wanted = before


def _answer(tuner: LibraryTuner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base model's `generate` with the stacks that are on.

    A KV cache that was filled with other stacks, as in a chat whose turns take different routes, is emptied first; so is one
    that an interrupted answer left half filled, or that the caller's own forwards filled, with whatever stacks were on.
    """
    cache, on = kwargs.get("past_key_values"), tuner.selection.wanted
    read_with = (on.names, None if on.weights is None else on.weights.tolist())
    if cache is not None:
        if cache.get_seq_length() and getattr(cache, _READ_WITH, None) != read_with:
            cache.reset()
        setattr(cache, _READ_WITH, None)
    answer = tuner.model.generate(*args, **kwargs)
    if cache is not None:
        setattr(cache, _READ_WITH, read_with)
    return answer


def _one_route_each(
    tuner: LibraryTuner, args: tuple[Any, ...], kwargs: Mapping[str, Any], domains: Domains | None
) -> list[PromptRoute]:
    """The routes for a call of `generate`: one for all rows, or one per prompt. Raises ValueError as `routes_for` does."""
    if isinstance(domains, Mapping):
        return routes_for(tuner, None, None, None, domains)
    ids, mask = _prompts(tuner, args, kwargs)
    routes = routes_for(tuner, ids, mask, None, domains)
    if len(routes) != len(ids):
        raise ValueError(f"`domains` has {len(routes)} mappings for {len(ids)} prompts: give one a prompt")
    return routes


def routed_forward(tuner: LibraryTuner, *args: Any, **kwargs: Any) -> Any:
    """A plain forward in mode "routed". The prompt of a row is its tokens before the first label; without labels, all tokens.

    Raises:
        ValueError: as `route`; also for a forward on a filled KV cache, whose input is not the whole prompt.
    """
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "A forward on a KV cache has no prompt to route on: put the loop into `with tuner.routed(prompts)`"
        )
    ids, mask = _prompts(tuner, args, kwargs)
    if kwargs.get("labels") is not None:
        before = mask * (kwargs["labels"] == IGNORED).long().cumprod(1)  # (rows, tokens), 1 before the first label
        # A row whose first token has a label has no prompt; it is routed on all of its tokens.
        mask = torch.where(before.any(1, keepdim=True), before, mask)
    chosen = tuner.selection.wanted
    try:
        tuner.use_stacks(*stack_weights(tuner, route(tuner, ids, mask)))
        return tuner.model(*args, **kwargs)
    finally:
        tuner.selection.wanted = chosen


def _domains(tuner: LibraryTuner) -> list[str]:
    """The domains that have a stack, oldest first."""
    return list(dict.fromkeys(stack.domain for stack in tuner.stacks))


def _router(tuner: LibraryTuner) -> Router:
    """The library's router, loaded when it is first needed. Raises ValueError as `route` does."""
    if tuner.router is None:
        if tuner.resident is None:
            raise ValueError("This model has no router: load one with `PeftModel.from_pretrained(base, library)`")
        library = Library.open(tuner.resident.path)
        if [stack.name for stack in library.manifest.active_stacks] != [stack.name for stack in tuner.stacks]:
            raise ValueError(f"{library.path} has other stacks than when this model was loaded: load it again")
        tuner.router = Router.load(library)
    return tuner.router


def _routes_by_itself(tuner: LibraryTuner) -> bool:
    """Whether `generate` routes prompts when the caller names no domains. Warns if it would but the library has no router."""
    if tuner.mode != "auto":
        return tuner.mode == "routed"
    if tuner.router is not None or tuner.resident is None:
        return tuner.router is not None
    path = tuner.resident.path
    if Library.open(path).manifest.router is None:
        warnings.warn(
            f"{path} has no router, so all of its stacks answer at once: run `axolotl brainstacks-router` on its YAML, "
            "or name stacks with `domains=`",
            stacklevel=4,
        )
        return False
    return True


def _prompts(tuner: LibraryTuner, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (rows, tokens) of a call of `generate` or `forward`.

    A missing mask is inferred as `generate` infers it: padding tokens are masked, unless they are also end-of-sequence tokens.
    """
    ids = next((ids for ids in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs")) if ids is not None), None)
    if ids is None:
        raise ValueError("The router reads a prompt's `input_ids`, and there are none: name stacks with `domains=`")
    mask = kwargs.get("attention_mask")
    if mask is None:
        pad, eos = (_setting(tuner, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
        known = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        mask = ids.ne(pad).long() if known else torch.ones_like(ids)
    return ids, mask


def _setting(tuner: LibraryTuner, kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate`: the call's own, else that of its `generation_config`, else the model's."""
    configs = (kwargs.get("generation_config"), tuner.model.generation_config)
    given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in given if value is not None), None)
