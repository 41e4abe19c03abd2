"""The `brainstacks.router:` block of an Axolotl YAML: how a router is made, and how it weighs domains."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ThresholdArgs(StrictModel):
    """The probability at which the router switches a domain on, and the least weight of each domain."""

    gate_threshold: float = Field(
        default=0.12,
        ge=0,
        le=1,
        description="Domains with a smaller probability stay off; `weights: auto` tries other thresholds, too.",
    )
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="Smallest weight of each domain named, for every prompt, such as `{chat: 0.2}`.",
    )

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
        description="A domain that is on has its probability (`soft`) or 1 (`hard`) as its weight; `auto` chooses the kind of "
        "weights and the threshold by the loss on validation prompts.",
    )


class DiscoveryArgs(StrictModel):
    """How the best set of domains of a prompt is found, and on which prompts (arXiv 2604.01152, outcome router)."""

    search: Literal["auto", "greedy", "exhaustive"] = Field(
        default="auto",
        description="How the best set of domains is searched for. `greedy` grows a set from the base model and shrinks one from "
        "all domains; `exhaustive` tries all sets (up to 8 domains); `auto` is exhaustive up to 4 domains, else greedy.",
    )
    samples: int = Field(default=200, ge=3, description="Largest number of held-out prompts per domain.")
    min_gain: float = Field(
        default=0.01, ge=0, description="A domain joins the best set only if it lowers the loss by more than this."
    )
    soft_domains: list[str] = Field(
        default_factory=list,
        description="Domains whose target is 0.5 when adding them to the best set lowers the loss, by however little.",
    )
    label_blend: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of the prompt's own domain in its target; the measured set has the rest.",
    )
    mixed_datasets: list[dict[str, Any]] | None = Field(
        default=None, description="Held-out prompts of several domains each, as ordinary entries of `datasets:`."
    )
    mixed_pairs: int = Field(
        default=32,
        ge=0,
        description="Prompts made by joining two domains' prompts, when `mixed_datasets` names none.",
    )


class FitArgs(StrictModel):
    """The router's network and its training (arXiv 2604.01152, outcome router)."""

    width: int = Field(default=512, ge=2, description="Width of the router's network.")
    max_tokens: int = Field(
        default=256, ge=1, description="The router reads this many tokens from the end of a prompt."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout of the router's network.")
    epochs: int = Field(default=8, ge=1, description="Passes over the router's training prompts.")
    batch_size: int = Field(default=16, ge=1, description="Prompts per optimiser step of the router.")
    learning_rate: float = Field(
        default=8e-4, gt=0, description="Peak learning rate of the router (AdamW, cosine schedule)."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Weight decay of the router's optimiser.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient norm at which the router's gradients are clipped."
    )
    confidence_coef: float = Field(default=0.05, ge=0, description="Weight of the penalty on probabilities near 0.5.")
    confidence_margin: float = Field(
        default=0.3, ge=0, le=0.5, description="Distance from 0.5 below which a probability is penalised."
    )
    score: tuple[float, float, float] = Field(
        default=(0.50, 0.35, -0.15),
        description="Weights of top-1 accuracy, set match and BCE in the score that chooses the best epoch.",
    )
    validation_share: float = Field(
        default=0.15, gt=0, lt=0.5, description="Share of the prompts on which epoch and gate are chosen."
    )
    test_share: float = Field(
        default=0.15,
        gt=0,
        lt=0.5,
        description="Share of the prompts on which the router is evaluated, and nothing is fitted.",
    )
    seed: int = Field(default=42, description="Seed of the choice of prompts, of their split and of the fit.")


class RouterArgs(CalibrationArgs, DiscoveryArgs, FitArgs):
    """How the router is made and how it weighs domains (arXiv 2604.01152, outcome router)."""

    def gate(self, weights: Literal["soft", "hard"] | None = None, threshold: float | None = None) -> GateArgs:
        """The router's thresholds with these settings, or with another kind of weights or another `gate_threshold`.

        `weights: auto` counts as soft until calibration has chosen.
        """
        return GateArgs(
            gate_threshold=self.gate_threshold if threshold is None else threshold,
            weights=weights or ("soft" if self.weights == "auto" else self.weights),
            floors=self.floors,
        )
