"""The `brainstacks:` block of an Axolotl YAML, and every rule that can be checked on the block alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from axolotl_brainstacks.names import DOMAIN_NAME, FrozenDtype


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BoostingArgs(_Strict):
    """Inner loop: how many stacks a domain gets, and when a round ends early (arXiv 2604.01152, residual
    boosting)."""

    max_rounds: int = Field(default=2, ge=1, description="Most stacks per domain.")
    min_loss_delta: float = Field(
        default=0.002, ge=0, description="Stop when a round gains less validation loss than this."
    )
    patience: int = Field(default=4, ge=1, description="End a round after so many evaluations without gain.")
    spike_threshold: float = Field(default=0.1, gt=0, description="End a round when the loss exceeds its best by this.")


class NullSpaceArgs(_Strict):
    """How far a domain is kept out of the directions of others."""

    directions: int = Field(
        default=64,
        ge=0,
        description="Most columns that protect a domain, per projection; 0: it trains without regard to others. Default with "
        "`context: isolated`: 0.",
    )
    samples: int = Field(default=400, ge=1, description="Validation rows of a domain to fit its columns on.")
    min_capacity: float = Field(
        default=0.25, ge=0, le=1, description="Warn when a smaller share of a projection's output space is left."
    )


class ThresholdArgs(_Strict):
    """From which probability on a domain is on, and what it weighs at least."""

    gate_threshold: float = Field(
        default=0.12,
        ge=0,
        le=1,
        description="Domains below this probability stay off; `weights: auto` tries others too.",
    )
    floors: dict[str, float] = Field(default_factory=dict, description="Least weight of a domain.")

    @field_validator("floors")
    @classmethod
    def _floors_are_weights(cls, floors: dict[str, float]) -> dict[str, float]:
        for domain, floor in floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(f"brainstacks.router.floors.{domain} is {floor}; a floor must be in [0, 1]")
        return floors


class GateArgs(ThresholdArgs):
    """How weights are read off the router's probabilities; stored with a fitted router."""

    weights: Literal["soft", "hard"] = "soft"


class CalibrationArgs(ThresholdArgs):
    """What the user asks of the gate. `auto` measures which one answers best (see `routing.calibrate`)."""

    weights: Literal["auto", "soft", "hard"] = Field(
        default="auto",
        description="A domain that is on weighs its probability (`soft`) or 1 (`hard`); `auto`: this and the threshold, "
        "as validation prompts are answered best.",
    )


class DiscoveryArgs(_Strict):
    """What the best set of domains of a prompt is, and on which prompts it is measured (arXiv 2604.01152, router)."""

    search: Literal["auto", "greedy", "exhaustive"] = Field(
        default="auto",
        description="`greedy`: grow the set from the base and shrink it from all; `exhaustive`: try all 2^D (up to 8 "
        "domains); `auto`: exhaustive up to 4 domains.",
    )
    samples: int = Field(default=200, ge=3, description="Most held-out prompts per domain.")
    min_gain: float = Field(
        default=0.01, ge=0, description="Each domain of the best set, the first too, has to lower the loss by more."
    )
    soft_domains: list[str] = Field(
        default_factory=list, description="Domains that count half when adding them to the best set helps at all."
    )
    label_blend: float = Field(default=0.2, ge=0, le=1, description="Share of a prompt's own domain in its target.")
    mixed_datasets: list[dict[str, Any]] | None = Field(
        default=None, description="Held-out prompts of several domains each, as ordinary entries of `datasets:`."
    )
    mixed_pairs: int = Field(
        default=32, ge=0, description="Joined two-domain prompts, in all parts together, when none are named."
    )


class FitArgs(_Strict):
    """The router's network and its training (arXiv 2604.01152, router)."""

    width: int = Field(default=512, ge=2, description="Width of the projected tokens.")
    max_tokens: int = Field(
        default=256, ge=1, description="Tokens of a prompt that the router reads, counted from its end."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of the router's network.")
    epochs: int = Field(default=8, ge=1, description="Passes over the router's training prompts.")
    batch_size: int = Field(default=16, ge=1, description="Prompts per step of the router's fit.")
    learning_rate: float = Field(default=8e-4, gt=0, description="Of the router's fit; AdamW, cosine.")
    weight_decay: float = Field(default=0.01, ge=0, description="Of the router's fit.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Of the router's fit.")
    confidence_coef: float = Field(default=0.05, ge=0, description="Weight of the penalty on undecided probabilities.")
    confidence_margin: float = Field(default=0.3, ge=0, le=0.5, description="Undecided: closer to 0.5 than this.")
    score: tuple[float, float, float] = Field(
        default=(0.50, 0.35, -0.15),
        description="Weights of top-1, set match and BCE by which the best epoch is chosen.",
    )
    validation_share: float = Field(
        default=0.15, gt=0, lt=0.5, description="Share of prompts that choose the epoch and the gate."
    )
    test_share: float = Field(default=0.15, gt=0, lt=0.5, description="Share of prompts never fitted on.")
    seed: int = Field(default=42, description="Of the choice of prompts, the split and the fit.")


class RouterArgs(CalibrationArgs, DiscoveryArgs, FitArgs):
    """The `brainstacks.router:` block, flat."""

    def gate(self, weights: Literal["soft", "hard"] | None = None, threshold: float | None = None) -> GateArgs:
        """The gate of these settings, or with another kind of weights or threshold. `auto` is soft until calibrated."""
        return GateArgs(
            gate_threshold=self.gate_threshold if threshold is None else threshold,
            weights=weights or ("soft" if self.weights == "auto" else self.weights),
            floors=self.floors,
        )


class SampleArgs(_Strict):
    """Answers written to report/samples.jsonl after every stack, to read what it learned."""

    prompts: int = Field(default=2, ge=0, description="Validation prompts to answer; 0 turns samples off.")
    max_new_tokens: int = Field(default=48, ge=1, description="Length of such an answer.")


class RLArgs(_Strict):
    """When a round of preference or reinforcement learning ends early, and when its stack is kept."""

    max_loss_increase: float = Field(
        default=0.05, ge=0, description="Most by which a kept RL round may raise the domain's own validation loss."
    )
    max_reward_drop: float = Field(
        default=0.2, gt=0, description="End a GRPO round when the held-out reward falls this far below its start."
    )
    loss_spike: float = Field(
        default=10.0, gt=0, description="End an RL round when a logged training loss exceeds its first by this."
    )


class StageSettings(_Strict):
    """Keys of `brainstacks:` that may differ by domain, or by RL round; those left out keep the value above them."""

    boosting: BoostingArgs | None = None
    null_space: NullSpaceArgs | None = None
    samples: SampleArgs | None = None
    rl: RLArgs | None = None
    balance_coef: float | None = Field(default=None, ge=0)
    noisy_gate: bool | None = None

    def over(self, block: BrainstacksBlock) -> BrainstacksBlock:
        """`block` with these values in place of its own; of a nested block only the keys that are given."""
        update: dict[str, Any] = {}
        for key in self.model_fields_set:
            value, old = getattr(self, key), getattr(block, key, None)
            if isinstance(value, BaseModel) and isinstance(old, BaseModel):
                changes = {name: getattr(value, name) for name in value.model_fields_set}
                value = old.model_copy(update=changes)
            if value is not None:
                update[key] = value
        return block.model_copy(update=update)


class DomainSettings(StageSettings):
    """`brainstacks:` in a domain's entry."""

    eval_rows: int | None = Field(default=None, ge=1)
    router_datasets: list[dict[str, Any]] | None = Field(
        default=None,
        description="Held-out rows for the router, as entries of `datasets:`; default: the domain's validation rows.",
    )


class RLRoundArgs(BaseModel):
    """An entry of `rl_rounds:`: the kind of learning, and any ordinary Axolotl keys that differ from the domain's."""

    model_config = ConfigDict(extra="allow")

    rl: Literal["dpo", "ipo", "simpo", "orpo", "kto", "grpo", "gdpo"]
    brainstacks: StageSettings = Field(default_factory=StageSettings)

    @property
    def overlay(self) -> dict[str, Any]:
        return dict(self.model_extra or {}) | {"rl": self.rl}


class DomainArgs(BaseModel):
    """One domain of the curriculum: its name, and any ordinary Axolotl keys that differ from the top level."""

    model_config = ConfigDict(extra="allow")

    name: str
    brainstacks: DomainSettings = Field(default_factory=DomainSettings)
    rl_rounds: list[RLRoundArgs] = Field(default_factory=list)

    @property
    def overlay(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BrainstacksBlock(_Strict):
    """The `brainstacks:` block."""

    library: str | None = Field(default=None, description="Folder of the library; default output_dir/library.")
    library_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The SHA-256 that the library's manifest has to have, as `axolotl brainstacks-library LIB list` prints it.",
    )
    num_experts: int = Field(default=4, ge=1, description="Experts of a stack.")
    top_k: int = Field(default=2, ge=1, description="Experts that a token uses.")
    noisy_gate: bool = Field(default=True, description="Noise on the gates in training, of a learned size.")
    balance_coef: float = Field(default=0.01, ge=0, description="Weight of the load-balance loss; 0 turns it off.")
    context: Literal["curriculum", "isolated"] = Field(
        default="curriculum", description="Whether earlier domains' stacks are on while a new one trains."
    )
    offload_frozen: bool = Field(
        default=False,
        description="Keep frozen stacks in CPU memory; a layer's are copied to the GPU while the one before computes.",
    )
    frozen_dtype: FrozenDtype = Field(
        default=None,
        description="`bfloat16`: over an fp32 base, frozen stacks in half the memory, and faster training where the CPU "
        "multiplies bf16. Default: the base model's type. A library keeps what its first stack had.",
    )
    max_resident_bytes: int | None = Field(
        default=None, ge=1, description="Most memory for stacks when answering; those used least recently leave first."
    )
    eval_rows: int = Field(
        default=256, ge=1, description="Validation rows per domain kept in the library for measuring."
    )
    boosting: BoostingArgs = Field(default_factory=BoostingArgs)
    null_space: NullSpaceArgs = Field(default_factory=NullSpaceArgs)
    router: RouterArgs = Field(default_factory=RouterArgs)
    samples: SampleArgs = Field(default_factory=SampleArgs)
    rl: RLArgs = Field(default_factory=RLArgs)
    domain: str | None = Field(default=None, description="Train one domain on the top-level `datasets:`.")
    domains: list[DomainArgs] | None = Field(default=None, description="The curriculum, in order.")

    @model_validator(mode="after")
    def _consistent(self) -> BrainstacksBlock:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"brainstacks.top_k is {self.top_k} but brainstacks.num_experts is {self.num_experts}; "
                "a token cannot use more experts than there are"
            )
        if (self.domain is None) == (self.domains is None) or self.domains == []:
            raise ValueError(
                "brainstacks: give either `domains:` (a curriculum) or `domain:` (one domain on the top-level datasets)"
                + (", not both" if self.domain is not None else "")
            )
        names = [domain.name for domain in self.curriculum]
        for name in names:
            if not DOMAIN_NAME.fullmatch(name):
                raise ValueError(
                    f"brainstacks.{'domains' if self.domains else 'domain'}: `{name}` cannot be a domain's name; use "
                    "lower-case letters, digits and _, a letter first, 32 characters at most"
                )
            if names.count(name) > 1:
                raise ValueError(f"brainstacks.domains: `{name}` is there twice; give each domain a name of its own")
        return self

    @model_validator(mode="after")
    def _isolated_domains_are_independent(self) -> BrainstacksBlock:
        if self.context == "isolated" and "directions" not in self.null_space.model_fields_set:
            self.null_space = self.null_space.model_copy(update={"directions": 0})
        return self

    @field_validator("library")
    @classmethod
    def _library_is_a_folder(cls, library: str | None) -> str | None:
        if library is not None and not library.strip():
            raise ValueError("name a folder, or leave the key out for output_dir/library")
        return library

    def check_names(self, library: Iterable[str]) -> None:
        """Raises ValueError when the router's settings name a domain neither of the curriculum nor of `library`."""
        known = list(dict.fromkeys([*library, *(domain.name for domain in self.curriculum)]))
        for key, names in (("floors", list(self.router.floors)), ("soft_domains", self.router.soft_domains)):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"brainstacks.router.{key} names `{name}`, but the domains are {', '.join(known)}: correct the name"
                    )

    def settings_of(self, domain: str) -> BrainstacksBlock:
        """The block as it holds for `domain`."""
        return next(entry for entry in self.curriculum if entry.name == domain).brainstacks.over(self)

    @property
    def curriculum(self) -> list[DomainArgs]:
        """The domains to train, in order; the one-domain form is a curriculum of one."""
        return self.domains or [DomainArgs(name=self.domain or "")]

    @classmethod
    def parse(cls, block: Any) -> BrainstacksBlock:
        """Validate the block of a YAML. Raises ValueError in one sentence per mistake, each naming its key."""
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise ValueError(explain(error, "brainstacks", cls, block)) from None


class BrainstacksArgs(BaseModel):
    """What the plugin adds to Axolotl's config schema."""

    brainstacks: BrainstacksBlock | None = None


def explain(error: ValidationError, root: str, model: type[BaseModel], block: Any = None) -> str:
    """What Pydantic found wrong, without its dump of the input: one sentence per mistake, under its key's path.

    In a path through `block`, the input, a domain goes by its name.
    """
    sentences = []
    for mistake in error.errors(include_url=False):
        path = ".".join(filter(None, [root, *map(str, _named(mistake["loc"], block))]))
        value, message = mistake["input"], mistake["msg"].removeprefix("Value error, ")
        shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        match mistake["type"]:
            case "value_error" if path == root or message.startswith("brainstacks"):
                sentences.append(message)
            case "value_error":
                sentences.append(f"`{path}` is {shown}: {message}")
            case "missing":
                sentences.append(f"`{path}` is missing")
            case "extra_forbidden":
                sentences.append(f"`{path}` is not a key{_did_you_mean(model, mistake['loc'])}")
            case _:
                sentences.append(f"`{path}` is {shown}: {message}")
    return "; ".join(sentences)


def _named(path: tuple[int | str, ...], block: Any) -> Iterator[int | str]:
    """`path` through `block` with the names of list entries that have one instead of their numbers."""
    for part in path:
        try:
            block = block[part]
        except (LookupError, TypeError):
            block = None
        name = block.get("name") if isinstance(part, int) and isinstance(block, Mapping) else None
        yield name if isinstance(name, str) else part


def _did_you_mean(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """The hint for an unknown key, the last part of `path`; only blocks of ours forbid unknown keys."""
    for part in path[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(kind for kind in (annotation, *_inner(annotation)) if _is_block(kind))
    return nearest(str(path[-1]), model.model_fields)


def _inner(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _inner(argument)


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown key: the known one most like it, if any."""
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean `{close[0]}`?" if close else ""
