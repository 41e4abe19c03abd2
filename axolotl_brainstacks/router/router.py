"""A fitted router: in memory, on disk in a library, and the route it gives each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from axolotl_brainstacks.adapter.tensors import check_values
from axolotl_brainstacks.args import GateArgs
from axolotl_brainstacks.guarded import folder_problem, parse_json, parse_tensors, printable, read
from axolotl_brainstacks.library import Library, Manifest, RouterEntry
from axolotl_brainstacks.library.storage import json_to_bytes, problem_of, record_of, tensors_to_bytes
from axolotl_brainstacks.router.features import MAX_TOKENS
from axolotl_brainstacks.router.network import OutcomeRouter
from axolotl_brainstacks.router.thresholds import gate

CONFIG = "router/router_config.json"
WEIGHTS = "router/router.safetensors"


class RouterConfig(BaseModel):
    """`router_config.json`: the network's shape, what it is fed, and how its probabilities become weights."""

    model_config = ConfigDict(extra="forbid")

    domains: list[str]
    features: int = Field(ge=1)
    width: int = Field(ge=2)
    dropout: float = Field(ge=0, lt=1)
    max_tokens: int = Field(default=MAX_TOKENS, ge=1)
    gate: GateArgs


@dataclass(frozen=True)
class Route:
    """What a batch of prompts is answered with; domains in the router's order.

    weights: (rows, domains), factor of each domain's stacks. probabilities: (rows, domains). uncovered: (rows,), bool:
    the router claims the prompt for no domain.
    """

    weights: Tensor
    probabilities: Tensor
    uncovered: Tensor


class Stack(Protocol):
    """A frozen stack, as attached to a model or as listed in a manifest."""

    @property
    def name(self) -> str: ...
    @property
    def domain(self) -> str: ...


@dataclass
class Router:
    """The network and what belongs to it."""

    network: OutcomeRouter
    config: RouterConfig

    @classmethod
    def fresh(cls, config: RouterConfig, seed: int) -> Router:
        """A router with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = OutcomeRouter(config.features, len(config.domains), config.width, config.dropout)
        return cls(network, config)

    @property
    def domains(self) -> list[str]:
        return self.config.domains

    @torch.no_grad()
    def route(self, hidden: Tensor, mask: Tensor) -> Route:
        """The route of every row: `hidden` (rows, tokens, features) and `mask` (rows, tokens) of `base_features`.

        The network is moved to the features' device once.

        Raises:
            ValueError: if the router was fitted on features of another width.
        """
        if hidden.shape[-1] != self.config.features:
            raise ValueError(
                f"The router reads {self.config.features} features a token, but the model has {hidden.shape[-1]}: run "
                "`axolotl brainstacks-router` on its YAML again"
            )
        self.network.to(hidden.device).eval()
        probabilities = self.network(hidden, mask).sigmoid()
        weights, uncovered = gate(probabilities, self.domains, self.config.gate)
        return Route(weights, probabilities, uncovered)

    def stack_weights(self, route: Route, stacks: Iterable[Stack]) -> tuple[list[str], Tensor]:
        """Names and weights (rows, names) of the stacks that a route needs, for `use_stacks`; see `spread`."""
        return spread(route.weights, self.domains, stacks)

    # On disk

    def save(self, library: Library) -> None:
        """Make this the library's router. Raises ValueError when the library is being written by another process."""
        config = json_to_bytes(self.config.model_dump())
        weights = tensors_to_bytes(dict(self.network.state_dict()), "the router")
        with library.writing():
            files = {CONFIG: library.write_file(CONFIG, config), WEIGHTS: library.write_file(WEIGHTS, weights)}
            library.set_router(RouterEntry(files=files, domains=self.domains))

    @classmethod
    def load(cls, library: Library) -> Router:
        """The library's router, on the CPU.

        Raises:
            ValueError: if there is none, it is stale, knows other domains than the library or has them in another order, or
                its files are damaged, unlisted or do not fit each other.
        """
        fix = "run `axolotl brainstacks-router` on its YAML"
        entry, domains = library.manifest.router, routable_domains(library.manifest)
        if entry is None:
            raise ValueError(f"{library.path} has no router: {fix}")
        if entry.stale:
            raise ValueError(f"the router of {library.path} is stale, its domains have changed since: {fix} again")
        if entry.domains != domains:
            raise ValueError(
                f"the router of {library.path} knows {', '.join(entry.domains) or 'no domain'}, but the library has "
                f"{', '.join(domains) or 'no finished domain'}: {fix} again"
            )
        try:
            config, weights = (_listed(library.path, entry, file) for file in (CONFIG, WEIGHTS))
            return cls._of(config, weights, domains)
        except _Damaged as error:
            raise ValueError(f"{error}: {fix} again") from error
        # ValidationError and most others are ValueErrors; safetensors and deep JSON have their own.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the router of {library.path} is damaged or was written by another version ({printable(error)}): {fix} again"
            ) from error

    @classmethod
    def _of(cls, config: bytes, weights: bytes, domains: list[str]) -> Router:
        """The router of two files. Nothing is made of a size that is not the weights' own."""
        settings = RouterConfig.model_validate(parse_json(config))
        tensors = parse_tensors(weights, WEIGHTS)
        check_values("The router", tensors)
        if settings.domains != domains:
            raise _Damaged(f"{CONFIG} is of the domains {', '.join(map(repr, settings.domains))}, not the library's")
        found = [list(tensors[name].shape) for name in ("project.weight", "domain_queries") if name in tensors]
        if found != [[settings.width, settings.features], [len(domains), settings.width]]:
            raise ValueError(f"{WEIGHTS} has other shapes than {CONFIG} says")
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise ValueError(f"{WEIGHTS} is not in fp32")
        router = cls.fresh(settings, seed=0)
        wanted = {name: tensor.shape for name, tensor in router.network.state_dict().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:  # torch would take some other shapes too
            raise ValueError(f"{WEIGHTS} has other tensors than a router of that shape")
        router.network.load_state_dict(tensors)
        return router


class _Damaged(Exception):
    """A file of the router that is not what the manifest lists."""


def _listed(folder: Path, entry: RouterEntry, file: str) -> bytes:
    """The content of a file, which is what the manifest lists."""
    path, record = folder / file, entry.files.get(file)
    if record is None:
        raise _Damaged(f"{path} is not listed in the manifest")
    if problem := folder_problem(folder, file) or problem_of(path, record, verify=False):
        raise _Damaged(problem)
    data = read(path, record.bytes)
    if record_of(data) != record:
        raise _Damaged(f"{path} is altered (its SHA-256 differs from the manifest's)")
    return data


def spread(weights: Tensor, domains: list[str], stacks: Iterable[Stack]) -> tuple[list[str], Tensor]:
    """A domain's weight goes to all of its stacks (arXiv 2604.01152, per-prompt domain weights).

    Args:
        weights: (rows, domains), in the order of `domains`.
        stacks: in the library's order.

    Returns:
        names of the stacks that any row needs, weights (rows, names).
    """
    used = {domain: column for column, domain in enumerate(domains) if bool((weights[:, column] != 0).any())}
    needed = [stack for stack in stacks if stack.domain in used]
    return [stack.name for stack in needed], weights[:, [used[stack.domain] for stack in needed]]


def routable_domains(manifest: Manifest) -> list[str]:
    """The finished domains that have a stack, in the library's order; a domain whose rounds all failed has none."""
    with_stacks = {stack.domain for stack in manifest.active_stacks}
    return [entry.name for entry in manifest.domains if entry.answers and entry.name in with_stacks]
