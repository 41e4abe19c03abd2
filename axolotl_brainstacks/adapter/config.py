"""Configuration of one stack, or of a whole library, as PEFT stores it in ``adapter_config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType


@dataclass
class BrainstacksConfig(PeftConfig):
    """One MoE-LoRA stack per targeted projection (paper section 1), optionally on top of a library of frozen stacks.

    Raises:
        ValueError: if a rank, expert count, top-k or coefficient is out of range.
    """

    r: int = field(default=16, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Scale numerator, see `scaling`."})
    num_experts: int = field(default=4, metadata={"help": "Experts per projection."})
    top_k: int = field(default=2, metadata={"help": "Experts a token uses."})
    use_rslora: bool = field(default=True, metadata={"help": "Scale alpha / sqrt(r) instead of alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the stack's input, in training only."})
    noisy_gate: bool = field(default=True, metadata={"help": "Shazeer's noise on the gate logits, in training only."})
    balance_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balance loss."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Projections to wrap."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Projections to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to wrap."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    library: str | None = field(
        default=None, metadata={"help": "Library of frozen stacks; a relative path counts from this config's folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BRAINSTACKS  # type: ignore[attr-defined]
        for name in ("r", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Brainstacks: {name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"Brainstacks: top_k is {self.top_k} but num_experts is only {self.num_experts}; lower top_k"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"Brainstacks: lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
        if self.balance_coef < 0:
            raise ValueError(f"Brainstacks: balance_coef is {self.balance_coef}; it must not be negative")
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))

    @property
    def scaling(self) -> float:
        """Factor on an expert's output: rsLoRA's alpha / sqrt(r), or plain alpha / r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> BrainstacksConfig:
        """As PEFT's, and makes `library` absolute. A library on the Hub is fetched whole: PEFT would take two files."""
        config: BrainstacksConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if config.library is not None:
            root = Path(pretrained_model_name_or_path)
            if not root.is_dir():
                from huggingface_hub import snapshot_download

                root = Path(snapshot_download(pretrained_model_name_or_path, revision=kwargs.get("revision")))
            config.library = str((root / (subfolder or "") / config.library).resolve())
        return config
