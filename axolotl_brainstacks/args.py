"""The schema of the `brainstacks:` block of an Axolotl YAML, with all checks that need nothing but the block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from axolotl_brainstacks.config_errors import explain
from axolotl_brainstacks.names import DOMAIN_NAME, FrozenDtype
from axolotl_brainstacks.router_args import RouterArgs, StrictModel


class BoostingArgs(StrictModel):
    """How many stacks a domain gets, and when a round ends early (arXiv 2604.01152, residual boosting)."""

    max_rounds: int = Field(
        default=2, ge=1, description="Largest number of supervised rounds, and so of stacks, per domain."
    )
    min_loss_delta: float = Field(
        default=0.002,
        ge=0,
        description="A round that lowers the validation loss by less than this is dropped, and is the domain's last.",
    )
    patience: int = Field(default=4, ge=1, description="A round ends after this many evaluations without a new best.")
    spike_threshold: float = Field(
        default=0.1, gt=0, description="A round ends when its validation loss exceeds its best by more than this."
    )


class NullSpaceArgs(StrictModel):
    """How strictly a domain is kept out of the output directions that other domains use (arXiv 2604.01152, null space)."""

    directions: int = Field(
        default=64,
        ge=0,
        description="Largest number of directions that protect one domain, per projection; 0: the domain trains without this "
        "constraint. With `context: isolated` the default is 0.",
    )
    samples: int = Field(
        default=400, ge=1, description="Validation rows of a domain on which its directions are fitted."
    )
    min_capacity: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="A warning appears when a smaller share of a projection's output space is left.",
    )


class SampleArgs(StrictModel):
    """Answers to validation prompts, written to `report/samples.jsonl` of the library after every stack."""

    prompts: int = Field(default=2, ge=0, description="Validation prompts to answer; 0 writes none.")
    max_new_tokens: int = Field(default=48, ge=1, description="Largest number of tokens of such an answer.")


class RLArgs(StrictModel):
    """When a round of preference or reinforcement learning ends early, and when its stack is not kept."""

    max_loss_increase: float = Field(
        default=0.05,
        ge=0,
        description="A round is dropped if it raises the domain's validation loss by more than this.",
    )
    max_reward_drop: float = Field(
        default=0.2, gt=0, description="A GRPO round ends when the held-out reward falls this far below its start."
    )
    loss_spike: float = Field(
        default=10.0,
        gt=0,
        description="A round ends when a logged training loss exceeds the first one by more than this.",
    )


class StageSettings(StrictModel):
    """Keys of `brainstacks:` that may differ by domain or RL round. A key that is left out has the value of the level above."""

    boosting: BoostingArgs | None = Field(default=None, description="As `brainstacks.boosting:`, key by key.")
    null_space: NullSpaceArgs | None = Field(default=None, description="As `brainstacks.null_space:`, key by key.")
    samples: SampleArgs | None = Field(default=None, description="As `brainstacks.samples:`, key by key.")
    rl: RLArgs | None = Field(default=None, description="As `brainstacks.rl:`, key by key.")
    balance_coef: float | None = Field(default=None, ge=0, description="As `brainstacks.balance_coef`.")
    noisy_gate: bool | None = Field(default=None, description="As `brainstacks.noisy_gate`.")

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

    eval_rows: int | None = Field(default=None, ge=1, description="As `brainstacks.eval_rows`.")
    router_datasets: list[dict[str, Any]] | None = Field(
        default=None,
        description="Held-out rows for the router, as entries of `datasets:`; by default the domain's validation rows.",
    )


class RLRoundArgs(BaseModel):
    """One round after the domain's supervised ones, with any ordinary Axolotl keys that differ from the domain's."""

    model_config = ConfigDict(extra="allow")

    rl: Literal["dpo", "ipo", "simpo", "orpo", "kto", "grpo", "gdpo"] = Field(description="The kind of learning.")
    brainstacks: StageSettings = Field(default_factory=StageSettings, description="Settings of this round alone.")

    @property
    def overlay(self) -> dict[str, Any]:
        """The ordinary Axolotl keys of the entry, `rl` included."""
        return dict(self.model_extra or {}) | {"rl": self.rl}


class DomainArgs(BaseModel):
    """One domain of the curriculum: its name, and any ordinary Axolotl keys that differ from the top level."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Lower-case letters, digits and _, a letter first, 32 characters at most.")
    brainstacks: DomainSettings = Field(default_factory=DomainSettings, description="Settings of this domain alone.")
    rl_rounds: list[RLRoundArgs] = Field(
        default_factory=list, description="Rounds of preference or reinforcement learning, in order."
    )

    @property
    def overlay(self) -> dict[str, Any]:
        """The ordinary Axolotl keys of the entry."""
        return dict(self.model_extra or {})


class BrainstacksBlock(StrictModel):
    """The `brainstacks:` block."""

    library: str | None = Field(
        default=None, description="Folder of the library; by default `library` in `output_dir`."
    )
    library_sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 that the library's manifest must have; `axolotl brainstacks-library LIB list` prints it.",
    )
    num_experts: int = Field(default=4, ge=1, description="Experts per stack and projection.")
    top_k: int = Field(default=2, ge=1, description="Experts per token.")
    noisy_gate: bool = Field(default=True, description="Whether training adds noise of a learned size to the gates.")
    balance_coef: float = Field(default=0.01, ge=0, description="Weight of the load-balance loss; 0 turns it off.")
    context: Literal["curriculum", "isolated"] = Field(
        default="curriculum",
        description="`curriculum`: earlier domains' stacks are on while a domain trains; `isolated`: only its own are.",
    )
    offload_frozen: bool = Field(
        default=False,
        description="Frozen stacks stay in CPU memory; each layer's are copied to the GPU while the layer before computes.",
    )
    frozen_dtype: FrozenDtype = Field(
        default=None,
        description="Type of frozen stacks in memory; by default the base model's. `bfloat16` over an fp32 base halves their "
        "memory, and training is faster where the CPU multiplies bf16. All stacks of a library have one type.",
    )
    max_resident_bytes: int | None = Field(
        default=None, ge=1, description="Memory limit for stacks when answering; the least recently used leave first."
    )
    eval_rows: int = Field(
        default=256, ge=1, description="Validation rows per domain on which all of its losses are measured."
    )
    boosting: BoostingArgs = Field(default_factory=BoostingArgs)
    null_space: NullSpaceArgs = Field(default_factory=NullSpaceArgs)
    router: RouterArgs = Field(default_factory=RouterArgs)
    samples: SampleArgs = Field(default_factory=SampleArgs)
    rl: RLArgs = Field(default_factory=RLArgs)
    domain: str | None = Field(default=None, description="Name of one domain, trained on the top-level `datasets:`.")
    domains: list[DomainArgs] | None = Field(
        default=None, description="The curriculum in training order; either this or `domain`."
    )

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
