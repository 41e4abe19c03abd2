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

from axolotl_brainstacks.adapter.folder import check_kind, check_stack, fetch_library, fetch_stack

# Trained scales are far smaller. With a larger one the activations could overflow, and then also spoil the rows of a batch that
# do not use the stack: their weight is 0, and 0 * inf is NaN.
MOST_SCALE = 1e6


@dataclass
class BrainstacksConfig(PeftConfig):
    """Config of a trainable MoE-LoRA stack (arXiv 2604.01152, MoE-LoRA building block), or of a library of frozen stacks.

    `library` tells the two apart. The stack covers each projection that `target_modules` names.

    Raises:
        ValueError: if a value has the wrong type; if a rank, expert count, top-k, scale or coefficient is out of range; if
            layers are chosen in a way that PEFT would ignore; or if `modules_to_save` is set together with `library`.
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
        """Reject what PEFT would silently ignore: layers next to a regular expression, and a pattern without layers."""
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
            # For a classifier PEFT appends the names of its heads, so this must be a list that is ours to change.
            self.modules_to_save = list(self.modules_to_save)
        self.check_library_alone()

    def check_library_alone(self) -> None:
        """Check that no module of the base model is trained together with a library.

        Raises:
            ValueError: if `modules_to_save` is set, as the library's stacks were trained on the unchanged base model.
        """
        if self.library is not None and self.modules_to_save:
            raise ValueError(
                f"Brainstacks: modules_to_save is {self.modules_to_save!r}, but `library` is {self.library!r}, whose stacks "
                "need the base model as it is: leave one of them out (PEFT sets modules_to_save itself for the task types "
                "SEQ_CLS, TOKEN_CLS and QUESTION_ANS)"
            )

    def _typed(self, name: str, kind: Any) -> Any:
        """The value of the key `name`. Raises ValueError unless it is an instance of `kind`."""
        value = getattr(self, name)
        # `True` is an int in Python, but no rank.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"Brainstacks: {name} is {value!r}; it must be of type {expected}")
        return value

    def _names(self, name: str, kind: type) -> None:
        """Raises ValueError unless the key `name` is None, one value of type `kind`, or several."""
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
        """Number of rows of a projection's A matrix: n gate rows, n noise rows and r rows for each of the n experts."""
        return 2 * self.num_experts + self.num_experts * self.r

    @classmethod
    def for_library(cls, base_model: str, library: str) -> BrainstacksConfig:
        """The config of a PEFT folder that stands for a whole library and holds no stack itself.

        Args:
            base_model: name or path of the base model.
            library: path of the library, as the config stores it.
        """
        return cls(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
            target_modules=DUMMY_TARGET_MODULES,
            library=library,
            inference_mode=True,
        )

    @classmethod
    def of_stack(cls, name: str, values: Mapping[str, Any]) -> BrainstacksConfig:
        """The config of a library's stack, from the content of its ``adapter_config.json``.

        Args:
            name: of the stack, for errors.
            values: the file's keys and values; keys that this version does not know are ignored.

        Raises:
            ValueError: if the file is not the config of a stack, or one of its values is wrong.
        """
        known = {part.name for part in fields(cls)}
        if not isinstance(values, Mapping) or values.get("peft_type") != "BRAINSTACKS" or values.get("library"):
            raise ValueError(
                f"Stack {name}: its {CONFIG_NAME} is not the config of a stack: restore it from a copy of the library"
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
        """Load a config as PEFT does, check its folder, and make `library` an absolute path.

        This downloads all files that answering needs of a library on the Hub, and the weights of a stack, to check them; PEFT
        itself downloads the config and one file of weights only.

        A stack's regular expressions that choose modules become the names of the modules that its tensors belong to.

        Args:
            pretrained_model_name_or_path: local folder, or repository on the Hub.
            subfolder: folder of the config in it.
            kwargs: as PEFT's, such as `revision`, `token` and `cache_dir`.

        Raises:
            ValueError: if the config of a library names another library or none; if a stack's config does not fit the
                tensors in its folder, or a library is pinned and this is a stack; or if the weights are a pickle or no regular
                file.
        """
        config: BrainstacksConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        # PEFT takes a path that exists for a folder, and anything else for a repository.
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        local = (folder / CONFIG_NAME).is_file()
        options = cls._split_kwargs(kwargs)[0]
        if not local and config.library is None:
            folder = fetch_stack(pretrained_model_name_or_path, subfolder or "", options)
        check_kind(config, folder)
        if config.library is None:
            check_stack(config, folder)
        elif local:
            config.library = str((folder / config.library).resolve())
        else:
            config.library = fetch_library(config, pretrained_model_name_or_path, subfolder or "", options)
        return config
