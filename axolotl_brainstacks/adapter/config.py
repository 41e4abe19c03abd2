"""Configuration of one stack, or of a whole library, as PEFT stores it in ``adapter_config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME, DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.peft_types import PeftType

from axolotl_brainstacks.adapter.folder import check_kind, check_rank, fetch_library

# No trained scale comes near; a larger one would let a stack overflow rows of a batch that do not use it.
MOST_SCALE = 1e6


@dataclass
class BrainstacksConfig(PeftConfig):
    """One MoE-LoRA stack per targeted projection (arXiv 2604.01152, MoE-LoRA building block), or a library of frozen stacks,
    or the one on top of the other.

    Raises:
        ValueError: if a value is of a wrong type, or a rank, expert count, top-k, scale or coefficient is out of range; if
            layers are chosen where PEFT could not heed it; or if `modules_to_save` is set on a library.
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
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Other modules to train in full and save, such as a classifier; impossible with `library`."},
    )
    library: str | None = field(
        default=None, metadata={"help": "Library of frozen stacks; a relative path counts from this config's folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BRAINSTACKS  # type: ignore[attr-defined]
        for name in ("r", "num_experts", "top_k"):
            if self._typed(name, int) < 1:
                raise ValueError(f"Brainstacks: {name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"Brainstacks: top_k is {self.top_k} but num_experts is only {self.num_experts}; lower top_k"
            )
        for name in ("use_rslora", "noisy_gate", "inference_mode"):
            self._typed(name, bool)
        if not 0 <= self._typed("lora_dropout", int | float) < 1:
            raise ValueError(f"Brainstacks: lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
        if not 0 <= self._typed("balance_coef", int | float) < math.inf:
            raise ValueError(
                f"Brainstacks: balance_coef is {self.balance_coef}; it must not be negative, nor infinite or NaN"
            )
        if not abs(self._typed("lora_alpha", int | float)) <= MOST_SCALE:
            raise ValueError(
                f"Brainstacks: lora_alpha is {self.lora_alpha}; it must be a number of {MOST_SCALE:.0f} at most"
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self._names(name, str)
        self._names("layers_to_transform", int)
        self._check_layer_choice()
        self._check_modules_to_save()
        for name in ("library", "base_model_name_or_path", "revision"):
            self._typed(name, str | None)
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))

    def _check_layer_choice(self) -> None:
        """PEFT ignores layers beside a regular expression, and a pattern without layers."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"Brainstacks: `{name}` cannot be used when `target_modules` is a str, the regular expression "
                        f"{self.target_modules!r}: name the layers in it, or list the modules"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "Brainstacks: When `layers_pattern` is specified, `layers_to_transform` must also be specified. It says "
                f"which of {self.layers_pattern!r} are wrapped"
            )

    def _check_modules_to_save(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"Brainstacks: modules_to_save is {self.modules_to_save!r}; it must be a list of names")
        self._names("modules_to_save", str)
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)  # PEFT appends the heads of a classifier
        self.check_library_alone()

    def check_library_alone(self) -> None:
        """Raises ValueError if modules of the base model are to be trained beside a library, whose stacks were trained on the
        base model as it is."""
        if self.library is not None and self.modules_to_save:
            raise ValueError(
                f"Brainstacks: modules_to_save is {self.modules_to_save!r}, but `library` is {self.library!r}, whose stacks "
                "need the base model as it is: leave one of them out (PEFT sets modules_to_save itself for the task types "
                "SEQ_CLS, TOKEN_CLS and QUESTION_ANS)"
            )

    def _typed(self, name: str, kind: Any) -> Any:
        value = getattr(self, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"Brainstacks: {name} is {value!r}; it must be of type {expected}")
        return value

    def _names(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        items = value if isinstance(value, list | set | tuple) else [] if value is None else [value]
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
            raise ValueError(f"Brainstacks: {name} is {value!r}; it must be of type {kind.__name__}, or a list of them")

    @property
    def scaling(self) -> float:
        """Factor on an expert's output: rsLoRA's alpha / sqrt(r), or plain alpha / r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def rows(self) -> int:
        """Rows of a projection's A matrix: gate, noise, and the experts' ranks."""
        return 2 * self.num_experts + self.num_experts * self.r

    @classmethod
    def for_library(cls, base_model: str, library: str) -> BrainstacksConfig:
        """Config of a PEFT folder that stands for a whole library: no stack of its own, all of the library's."""
        return cls(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            target_modules=DUMMY_TARGET_MODULES,
            library=library,
            inference_mode=True,
        )

    @classmethod
    def of_stack(cls, name: str, values: Mapping[str, Any]) -> BrainstacksConfig:
        """The config of a library's stack, from the content of its file.

        Raises:
            ValueError: if it is none of a stack, or one of its values is wrong.
        """
        known = {part.name for part in fields(cls)}
        if not isinstance(values, Mapping) or values.get("peft_type") != "BRAINSTACKS" or values.get("library"):
            raise ValueError(
                f"Stack {name}: its {CONFIG_NAME} is none of a stack: restore it from a copy of the library"
            )
        if values.get("modules_to_save"):
            raise ValueError(
                f"Stack {name}: `modules_to_save` in its {CONFIG_NAME} is {values['modules_to_save']!r}, but a library holds "
                "stacks only: train without it"
            )
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError) as error:
            raise ValueError(f"Stack {name}: {CONFIG_NAME} is damaged ({error}): restore it from a copy") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> BrainstacksConfig:
        """As PEFT's, and makes `library` absolute. Of a library on the Hub everything that answers need is fetched: PEFT would
        take two files.

        Raises:
            ValueError: if the config stands for a library and names another one, or for nothing; or if a stack's config does
                not fit the tensors beside it.
        """
        config: BrainstacksConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        local = (folder / CONFIG_NAME).is_file()
        check_kind(config, folder)
        if config.library is None:
            check_rank(config, folder)
        elif local:
            config.library = str((folder / config.library).resolve())
        else:
            options = cls._split_kwargs(kwargs)[0]
            config.library = fetch_library(config, pretrained_model_name_or_path, subfolder or "", options)
        return config
