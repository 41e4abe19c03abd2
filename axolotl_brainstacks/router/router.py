"""A fitted router: the routes that it gives a batch of prompts, and its files in a library."""

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
from axolotl_brainstacks.guarded import folder_problem, parse_json, parse_tensors, printable
from axolotl_brainstacks.library import Library, Manifest, RouterEntry
from axolotl_brainstacks.library.storage import json_to_bytes, read_checked, tensors_to_bytes
from axolotl_brainstacks.names import ROUTER_FILES
from axolotl_brainstacks.router.features import MAX_TOKENS
from axolotl_brainstacks.router.network import OutcomeRouter
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import GateArgs

CONFIG, WEIGHTS = ROUTER_FILES


class RouterConfig(BaseModel):
    """`router_config.json`: the network's sizes, its input, and how probabilities become weights.

    Attributes:
        domains: in the library's order, which is that of the network's outputs.
        features: width of the base model's hidden states.
        width: width of the projected tokens.
        dropout: of the network, in training only.
        max_tokens: most tokens of a prompt that the router reads, counted from its end.
        gate: threshold, floors and kind of weights.
    """

    model_config = ConfigDict(extra="forbid")

    domains: list[str]
    features: int = Field(ge=1)
    width: int = Field(ge=2)
    dropout: float = Field(ge=0, lt=1)
    max_tokens: int = Field(default=MAX_TOKENS, ge=1)
    gate: GateArgs


@dataclass(frozen=True)
class Route:
    """The router's output for a batch of prompts, with domains in the router's order.

    Attributes:
        weights: (rows, domains), fp32, factor of each domain's stacks.
        probabilities: (rows, domains), fp32.
        uncovered: (rows,), bool, whether no domain's probability reached the threshold.
    """

    weights: Tensor
    probabilities: Tensor
    uncovered: Tensor


class Stack(Protocol):
    """A frozen stack, attached to a model (`FrozenStack`) or listed in a manifest (`StackEntry`)."""

    @property
    def name(self) -> str:
        """The stack's name in the library."""
        ...

    @property
    def domain(self) -> str:
        """The domain that it was trained for."""
        ...


@dataclass
class Router:
    """The network and its config."""

    network: OutcomeRouter
    config: RouterConfig

    @classmethod
    def fresh(cls, config: RouterConfig, seed: int) -> Router:
        """A router with random weights, which depend on the seed only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = OutcomeRouter(config.features, len(config.domains), config.width, config.dropout)
        return cls(network, config)

    @property
    def domains(self) -> list[str]:
        """The domains that the router chooses among, in the order of its outputs."""
        return self.config.domains

    @torch.no_grad()
    def route(self, hidden: Tensor, mask: Tensor) -> Route:
        """Route a batch of prompts. This moves the network to the device of `hidden` and puts it into evaluation mode.

        Args:
            hidden: (rows, tokens, features), from `base_features`.
            mask: (rows, tokens), from `base_features`.

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
        """The arguments of `use_stacks` for a route: names of the stacks it needs, and weights (rows, names); see `spread`."""
        return spread(route.weights, self.domains, stacks)

    # On disk

    def save(self, library: Library) -> None:
        """Make this the library's router.

        Raises:
            ValueError: if another process is writing the library.
        """
        config = json_to_bytes(self.config.model_dump())
        weights = tensors_to_bytes(dict(self.network.state_dict()), "the router")
        with library.writing():
            # The manifest comes last: a router counts only once both of its files are whole.
            files = {CONFIG: library.write_file(CONFIG, config), WEIGHTS: library.write_file(WEIGHTS, weights)}
            library.set_router(RouterEntry(files=files, domains=self.domains))

    @classmethod
    def load(cls, library: Library) -> Router:
        """The library's router, on the CPU.

        Raises:
            ValueError: if there is no router, it is stale, its domains or their order are not the library's, or its files are
                damaged, not listed in the manifest, or do not fit each other.
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
        # Pydantic's ValidationError is a ValueError. SafetensorError is not, and torch raises RuntimeError.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the router of {library.path} is damaged or was written by another version ({printable(error)}): {fix} again"
            ) from error

    @classmethod
    def _of(cls, config: bytes, weights: bytes, domains: list[str]) -> Router:
        """The router from the content of its two files.

        The network is built only after its sizes were checked against the weights, so that a damaged config cannot make this
        allocate any amount of memory.
        """
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
        # `load_state_dict` would accept a few other shapes too, such as (1,) for a scalar.
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
            raise ValueError(f"{WEIGHTS} has other tensors than a router of that shape")
        router.network.load_state_dict(tensors)
        return router


class _Damaged(Exception):
    """A file of the router differs from its entry in the manifest."""


def _listed(folder: Path, entry: RouterEntry, file: str) -> bytes:
    """The content of a file of the library. Raises _Damaged unless its size and SHA-256 are those in the manifest."""
    path, record = folder / file, entry.files.get(file)
    if record is None:
        raise _Damaged(f"{path} is not listed in the manifest")
    if problem := folder_problem(folder, file):
        raise _Damaged(problem)
    try:
        return read_checked(path, record)
    except ValueError as error:
        raise _Damaged(str(error)) from error


def spread(weights: Tensor, domains: list[str], stacks: Iterable[Stack]) -> tuple[list[str], Tensor]:
    """Give each domain's weight to all of its stacks (arXiv 2604.01152, per-prompt domain weights).

    Args:
        weights: (rows, domains).
        domains: names, in the order of the columns of `weights`.
        stacks: in the library's order.

    Returns:
        Names of the stacks that any row gives a weight other than 0, and their weights (rows, names).
    """
    used = {domain: column for column, domain in enumerate(domains) if bool((weights[:, column] != 0).any())}
    needed = [stack for stack in stacks if stack.domain in used]
    return [stack.name for stack in needed], weights[:, [used[stack.domain] for stack in needed]]


def routable_domains(manifest: Manifest) -> list[str]:
    """The finished domains that have a stack, in the library's order. A domain none of whose rounds was kept has no stack."""
    with_stacks = {stack.domain for stack in manifest.active_stacks}
    return [entry.name for entry in manifest.domains if entry.answers and entry.name in with_stacks]
