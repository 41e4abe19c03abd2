"""The schema of the `brainstacks:` block of an Axolotl YAML, with all checks that need nothing but the block."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from axolotl_brainstacks.names import DOMAIN_NAME, FrozenDtype


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BoostingArgs(_Strict):
    """How many supervised rounds a domain has, and when a round ends early (arXiv 2604.01152, residual boosting)."""

    max_rounds: int = Field(default=2, ge=1, description="Most stacks per domain.")
    min_loss_delta: float = Field(
        default=0.002, ge=0, description="Stop when a round gains less validation loss than this."
    )
    patience: int = Field(default=4, ge=1, description="End a round after so many evaluations without gain.")
    spike_threshold: float = Field(default=0.1, gt=0, description="End a round when the loss exceeds its best by this.")


class NullSpaceArgs(_Strict):
    """How a domain is kept out of the output directions of others (arXiv 2604.01152, null space)."""

    directions: int = Field(
        default=64,
        ge=0,
        description="Most columns that protect a domain, per projection; 0: the domain trains unconstrained. Default with "
        "`context: isolated`: 0.",
    )
    samples: int = Field(default=400, ge=1, description="Validation examples of a domain to fit its columns on.")
    min_capacity: float = Field(
        default=0.25, ge=0, le=1, description="Warn when a smaller share of a projection's output space is left."
    )


class ThresholdArgs(_Strict):
    """The probability at which the router switches a domain on, and the least weight of each domain."""

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
    """How the router's probabilities become the domains' weights; stored with a fitted router."""

    weights: Literal["soft", "hard"] = "soft"


class CalibrationArgs(ThresholdArgs):
    """The thresholds as the YAML gives them. With `weights: auto`, `router_training` measures which ones answer best."""

    weights: Literal["auto", "soft", "hard"] = Field(
        default="auto",
        description="The weight of a domain that is on: its probability (`soft`) or 1 (`hard`); `auto`: the kind, and the "
        "threshold, with the lowest loss on validation prompts.",
    )


class DiscoveryArgs(_Strict):
    """How the best set of domains of a prompt is found, and on which prompts (arXiv 2604.01152, outcome router)."""

    search: Literal["auto", "greedy", "exhaustive"] = Field(
        default="auto",
        description="`greedy`: grow the set from the base and shrink it from all; `exhaustive`: try all 2^D (up to 8 "
        "domains); `auto`: exhaustive up to 4 domains.",
    )
    samples: int = Field(default=200, ge=3, description="Most held-out prompts per domain.")
    min_gain: float = Field(
        default=0.01,
        ge=0,
        description="Each domain of the best set has to lower the loss by more than this.",
    )
    soft_domains: list[str] = Field(
        default_factory=list,
        description="Domains with a target of 0.5 if adding them to the best set lowers the loss at all.",
    )
    label_blend: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of a prompt's own domain in its target.",
    )
    mixed_datasets: list[dict[str, Any]] | None = Field(
        default=None, description="Held-out prompts of several domains each, as ordinary entries of `datasets:`."
    )
    mixed_pairs: int = Field(
        default=32,
        ge=0,
        description="Number of prompts made by joining two domains' prompts, if `mixed_datasets` is missing.",
    )


class FitArgs(_Strict):
    """The router's network and its training (arXiv 2604.01152, outcome router)."""

    width: int = Field(default=512, ge=2, description="Width of the projected tokens.")
    max_tokens: int = Field(
        default=256, ge=1, description="Tokens of a prompt that the router reads, counted from its end."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in the router's network.")
    epochs: int = Field(default=8, ge=1, description="Passes over the router's training prompts.")
    batch_size: int = Field(default=16, ge=1, description="Prompts per training step of the router.")
    learning_rate: float = Field(default=8e-4, gt=0, description="Learning rate of the router; AdamW, cosine schedule.")
    weight_decay: float = Field(default=0.01, ge=0, description="Weight decay of the router.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient norm at which the router's gradients are clipped."
    )
    confidence_coef: float = Field(
        default=0.05, ge=0, description="Weight of the penalty on probabilities close to 0.5."
    )
    confidence_margin: float = Field(
        default=0.3, ge=0, le=0.5, description="Probabilities closer to 0.5 than this are penalised."
    )
    score: tuple[float, float, float] = Field(
        default=(0.50, 0.35, -0.15),
        description="Weights of top-1 accuracy, set match and BCE in the score that chooses the best epoch.",
    )
    validation_share: float = Field(
        default=0.15, gt=0, lt=0.5, description="Share of prompts that choose the epoch and the thresholds."
    )
    test_share: float = Field(
        default=0.15, gt=0, lt=0.5, description="Share of prompts held out for the router's evaluation."
    )
    seed: int = Field(default=42, description="Seed for choosing prompts, splitting them and training the router.")


class RouterArgs(CalibrationArgs, DiscoveryArgs, FitArgs):
    """The `brainstacks.router:` block."""

    def gate(self, weights: Literal["soft", "hard"] | None = None, threshold: float | None = None) -> GateArgs:
        """The router's thresholds with these settings, or with another kind of weights or another `gate_threshold`.

        `weights: auto` counts as soft until calibration has chosen.
        """
        return GateArgs(
            gate_threshold=self.gate_threshold if threshold is None else threshold,
            weights=weights or ("soft" if self.weights == "auto" else self.weights),
            floors=self.floors,
        )


class SampleArgs(_Strict):
    """Sampled answers in report/samples.jsonl after every round, to read what its stack has learned."""

    prompts: int = Field(default=2, ge=0, description="Validation prompts to answer; 0 turns samples off.")
    max_new_tokens: int = Field(default=48, ge=1, description="Most tokens of such an answer.")


class RLArgs(_Strict):
    """When a round of preference or reinforcement learning ends early, and when its stack is not kept."""

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
    """Keys of `brainstacks:` that may differ by domain or RL round. A key that is left out has the value of the level above."""

    boosting: BoostingArgs | None = None
    null_space: NullSpaceArgs | None = None
    samples: SampleArgs | None = None
    rl: RLArgs | None = None
    balance_coef: float | None = Field(default=None, ge=0)
    noisy_gate: bool | None = None

    def over(self, block: BrainstacksBlock) -> BrainstacksBlock:
        """`block` with these values in place of its own; in a nested block, only the keys that are given replace others."""
        update: dict[str, Any] = {}
        for key in self.model_fields_set:
            value, old = getattr(self, key), getattr(block, key, None)
            # `model_fields_set` tells a key that the user gave from a default: a default must not replace the level above.
            if isinstance(value, BaseModel) and isinstance(old, BaseModel):
                changes = {name: getattr(value, name) for name in value.model_fields_set}
                value = old.model_copy(update=changes)
            if value is not None:
                update[key] = value
        return block.model_copy(update=update)


class DomainSettings(StageSettings):
    """The `brainstacks:` block in a domain's entry."""

    eval_rows: int | None = Field(default=None, ge=1)
    router_datasets: list[dict[str, Any]] | None = Field(
        default=None,
        description="Held-out examples for the router, as entries of `datasets:`; default: the domain's validation examples.",
    )


class RLRoundArgs(BaseModel):
    """An entry of `rl_rounds:`: the kind of RL, and any ordinary Axolotl keys that differ from the domain's."""

    model_config = ConfigDict(extra="allow")

    rl: Literal["dpo", "ipo", "simpo", "orpo", "kto", "grpo", "gdpo"]
    brainstacks: StageSettings = Field(default_factory=StageSettings)

    @property
    def overlay(self) -> dict[str, Any]:
        """The ordinary Axolotl keys of the entry, `rl` included."""
        return dict(self.model_extra or {}) | {"rl": self.rl}


class DomainArgs(BaseModel):
    """One domain of the curriculum: its name, and any ordinary Axolotl keys that differ from the top level."""

    model_config = ConfigDict(extra="allow")

    name: str
    brainstacks: DomainSettings = Field(default_factory=DomainSettings)
    rl_rounds: list[RLRoundArgs] = Field(default_factory=list)

    @property
    def overlay(self) -> dict[str, Any]:
        """The ordinary Axolotl keys of the entry."""
        return dict(self.model_extra or {})


class BrainstacksBlock(_Strict):
    """The `brainstacks:` block."""

    library: str | None = Field(default=None, description="Folder of the library. Default: output_dir/library.")
    library_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The SHA-256 that the library's manifest has to have, as `axolotl brainstacks-library LIB list` prints it.",
    )
    num_experts: int = Field(default=4, ge=1, description="Experts per stack.")
    top_k: int = Field(default=2, ge=1, description="Experts that each token uses.")
    noisy_gate: bool = Field(default=True, description="Add noise of a learned size to the expert gates in training.")
    balance_coef: float = Field(default=0.01, ge=0, description="Weight of the load-balance loss; 0 turns it off.")
    context: Literal["curriculum", "isolated"] = Field(
        default="curriculum", description="Whether earlier domains' stacks are on while a new one trains."
    )
    offload_frozen: bool = Field(
        default=False,
        description="Keep frozen stacks in CPU memory; each layer's are copied to the GPU while the layer before computes.",
    )
    frozen_dtype: FrozenDtype = Field(
        default=None,
        description="Dtype of frozen stacks. `bfloat16` halves their memory over an fp32 base, and trains faster on a CPU that "
        "multiplies bf16. Default: the base model's. All stacks of a library have the same.",
    )
    max_resident_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Most memory for stacks when answering; the least recently used are unloaded first.",
    )
    eval_rows: int = Field(
        default=256, ge=1, description="Validation examples per domain that the library keeps for measuring losses."
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
        # An isolated domain must come out the same whatever else is in the library, so other domains' columns must not
        # constrain it unless the user asks for them.
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
        """Raises ValueError if the router's settings name a domain that is neither in the curriculum nor in `library`."""
        known = list(dict.fromkeys([*library, *(domain.name for domain in self.curriculum)]))
        for key, names in (("floors", list(self.router.floors)), ("soft_domains", self.router.soft_domains)):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"brainstacks.router.{key} names `{name}`, but the domains are {', '.join(known)}: correct the name"
                    )

    def settings_of(self, domain: str) -> BrainstacksBlock:
        """The block with the settings of the domain's own entry."""
        return next(entry for entry in self.curriculum if entry.name == domain).brainstacks.over(self)

    @property
    def curriculum(self) -> list[DomainArgs]:
        """The domains to train, in order. With `domain:` there is one."""
        return self.domains or [DomainArgs(name=self.domain or "")]

    @classmethod
    def parse(cls, block: Any) -> BrainstacksBlock:
        """Validate the block of a YAML. Raises ValueError with one sentence per mistake, each of which names its key."""
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise ValueError(explain(error, "brainstacks", cls, block)) from None


class BrainstacksArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's config schema."""

    brainstacks: BrainstacksBlock | None = None


def explain(error: ValidationError, root: str, model: type[BaseModel], block: Any = None) -> str:
    """Describe a validation error with one sentence per mistake, each of which names the key by its path.

    Args:
        error: Pydantic's error; its dump of the input is left out.
        root: the start of each path.
        model: the schema that was validated, for "did you mean".
        block: the input. With it, a path names a domain by its name, not by its number in the list.
    """
    sentences = []
    for mistake in error.errors(include_url=False):
        path = ".".join(filter(None, [root, *map(str, _named(mistake["loc"], block))]))
        value, message = mistake["input"], mistake["msg"].removeprefix("Value error, ")
        # Only scalars are repeated in the message: a list or a mapping may fill the terminal.
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
    """`path` through `block`, with the name of each list entry that has one in place of its number."""
    for part in path:
        try:
            block = block[part]
        except (LookupError, TypeError):
            block = None
        name = block.get("name") if isinstance(part, int) and isinstance(block, Mapping) else None
        yield name if isinstance(name, str) else part


def _did_you_mean(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """The hint for an unknown key, the last part of `path`. Only our own blocks forbid unknown keys."""
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
    """The end of an error about an unknown key: the most similar known key, or "" if there is none."""
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean `{close[0]}`?" if close else ""
