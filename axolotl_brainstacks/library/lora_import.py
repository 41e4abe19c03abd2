"""Imports an ordinary PEFT LoRA adapter into a library, as a domain with one stack of one expert, whose gate is always 1."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import regex
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.adapter.tensors import stack_tensors
from axolotl_brainstacks.adapter.tuner import StackTuner
from axolotl_brainstacks.guarded import load_tensors, printable, read_json
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.entries import CONFIG, WEIGHTS, DomainEntry, StackEntry
from axolotl_brainstacks.library.library import Library
from axolotl_brainstacks.names import DOMAIN_NAME

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Options that do not change a trained adapter's output, or that `stack_of` reproduces. Any other option, also one that a
# newer PEFT adds, is assumed to change the output.
_TAKEN_OVER = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "inference_mode",
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "loftq_config", "megatron_core", "runtime_config"),
}
# With a scale of zero the adapter would do nothing.
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# PEFT matches the keys of `alpha_pattern` as regular expressions, and a stranger's expression can take for ever to match.
_MOST_REPEATS = 10_000
_MOST_PATTERNS, _LONGEST_PATTERN, _SECONDS = 10_000, 1_000, 5.0
# Values of `init_lora_weights` that leave the base model's weights alone; others (PiSSA, OLoRA, ...) change them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def import_lora(library_path: Path, name: str, folder: Path, base_model: str | None = None) -> StackEntry:
    """Add the LoRA adapter in `folder` as the finished domain `name`; make the library if there is none.

    This loads the base model, compares its architecture and weights with the library's record, and attaches every tensor to
    it once. The stack's outputs equal the adapter's up to rounding.

    Args:
        base_model: folder or Hub name of the base model; default: what the adapter's config names.

    Raises:
        ValueError: if the name is taken or not allowed, no stack can reproduce the adapter, or the base model is another one;
            nothing on disk has changed then.
    """
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError(f"`{name}` cannot be a domain's name: use lower-case letters, digits and _, a letter first")
    library = Library.open(library_path) if Library.exists(library_path) else None
    if library is None:
        Library.check_unpinned(library_path)
    elif name in [entry.name for entry in library.manifest.domains]:
        raise ValueError(f"{library_path} has a domain `{name}` already: choose another name, or remove it first")
    config = read_config(folder)
    pairs = read_pairs(folder)
    base_name = base_model or config.get("base_model_name_or_path") or ""
    revision = None if base_model else config.get("revision")
    model = _load_base(folder, base_name, revision)
    base = BaseModelInfo.of(model, base_name, revision)
    if library is not None:
        library.manifest.base.check(base)
    stack_config, tensors = stack_of(config, pairs)
    stack_config.base_model_name_or_path = base_name
    _try_on(model, name, stack_config, tensors, pairs)
    library = library or Library.create(library_path, base)
    with library.writing():
        library.complete_base(base)
        entry = DomainEntry(name=name, base_loss=math.nan, done=True)
        stack = library.import_domain(entry, stack_config.to_dict(), tensors)
        if not (library.path / CONFIG).exists():
            library.write_root_config(BrainstacksConfig.for_library(base_name, ".").to_dict())
    return stack


class _Scales(BaseModel):
    """The values that this module reads from an adapter's config."""

    model_config = ConfigDict(strict=True)

    lora_alpha: _Positive
    use_rslora: bool = False
    alpha_pattern: Annotated[dict[str, _Positive], Field(max_length=_MOST_PATTERNS)] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's config. Raises ValueError naming an option that no stack can reproduce."""
    path = folder / CONFIG
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no PEFT adapter: {CONFIG} cannot be read ({printable(error)})") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: `peft_type` is {_shown(config.get('peft_type'))}; only LORA can be imported")
    try:
        _Scales.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            printable(f"{path}: `{key}` is not what PEFT writes there ({first['msg']}); save the adapter again")
        ) from error
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key not in _TAKEN_OVER and value and value != defaults.get(key):
            raise ValueError(
                f"{path}: `{printable(key)}` is {_shown(json.dumps(value))}, and a stack cannot do that; train without it"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise ValueError(
            f"{path}: `init_lora_weights` is {_shown(config['init_lora_weights'])}, which changes the base model; convert it to "
            "a plain LoRA with PEFT's `path_initial_model_for_weight_conversion`"
        )
    return config


def read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the adapter's A (r, in) and B (out, r), both fp32, by module name; a projection whose B is zero is left out.

    Raises:
        ValueError: naming a tensor that is neither an A nor a B, is not finite, or lacks its counterpart.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{path} is missing; an adapter in another format has to be saved as safetensors first")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: `{printable(key)}` is no A or B matrix of a linear projection, and a stack has nothing else"
            )
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: `{printable(key)}` is a tensor of {tensor.dtype} of shape {list(tensor.shape)}, and no matrix of "
                "floating-point numbers; save the adapter again"
            )
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: `{printable(key)}` has NaN or infinite values; train the adapter again")
        found.setdefault(match["module"], {})[match["side"]] = tensor
    for module_name, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{path}: {printable(module_name)} has no A and B of one rank; the file is incomplete")
    pairs = {module_name: (pair["A"], pair["B"]) for module_name, pair in found.items() if pair["B"].any()}
    if not pairs:
        raise ValueError(f"{path}: every B matrix is zero, so the adapter changes nothing; train it first")
    return pairs


def stack_of(
    config: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[BrainstacksConfig, dict[str, Tensor]]:
    """Convert an adapter into a stack with the same output.

    All projections of a stack have one rank and one scale. A smaller rank is padded with zeros, which is exact; a scale
    that differs from the stack's is multiplied into B.

    Args:
        config: what `read_config` returns.
        pairs: A (r, in) and B (out, r) by module name, fp32.

    Returns:
        The stack's config and its tensors, by their keys in `adapter_model.safetensors`.

    Raises:
        ValueError: naming a key of `alpha_pattern` that is not a regular expression, or takes too long to match.
    """
    rank = max(a.shape[0] for a, _ in pairs.values())
    rslora, alpha = bool(config.get("use_rslora")), float(config["lora_alpha"])
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    keys = _alpha_keys(list(alphas), list(pairs))

    def divisor(r: int) -> float:
        return math.sqrt(r) if rslora else r

    stack_config = BrainstacksConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        num_experts=1,
        top_k=1,
        noisy_gate=False,
        balance_coef=0.0,
        target_modules=sorted(pairs),
        inference_mode=True,
    )
    stack = {}
    for module_name, (a, b) in pairs.items():
        key = keys.get(module_name)
        scale = (alpha if key is None else alphas[key]) / divisor(a.shape[0])
        missing = rank - a.shape[0]
        gate_and_noise = torch.zeros(2, a.shape[1])  # gate and noise row of the only expert, whose softmax is 1
        stack[module_name] = (
            torch.cat([gate_and_noise, F.pad(a, (0, 0, 0, missing))]),
            F.pad(b * (scale / stack_config.scaling), (0, missing)),
        )
    return stack_config, stack_tensors(stack)


def _pattern(key: str) -> regex.Pattern[str]:
    """The regular expression with which PEFT matches module names for a key of `alpha_pattern`."""
    try:
        if len(key) > _LONGEST_PATTERN:
            raise ValueError(f"longer than {_LONGEST_PATTERN} characters")
        # Compiling expands counted repeats, nested ones to their product, so their number bounds the memory it takes.
        counts = [int(number) for number in re.findall(r"\{(?:\d*,)?(\d{1,4})\}", key)]
        if key.count("{") != len(counts) or math.prod(counts) > _MOST_REPEATS:
            raise ValueError(f"more than {_MOST_REPEATS} repeats are counted, or not as {{1,3}}")
        # `regex` takes "[[:alpha:]]" for a class of letters, as `re` does not.
        if "[:" in key:
            raise ValueError("a class of characters as in POSIX")
        # PEFT uses `re`, so `re` has to accept the key; `regex` accepts more, but its matching can be timed out.
        re.compile(whole := rf"(.*\.)?({key})$")
        return regex.compile(whole)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`alpha_pattern` has the key `{printable(key[:100])}`, which is no regular expression that can be used ({error}); "
            "name modules there"
        ) from error


def _alpha_keys(keys: Sequence[str], module_names: Sequence[str]) -> dict[str, str]:
    """The first key of `alpha_pattern` that matches, by module name, as PEFT chooses it; modules without one are left out."""
    patterns = {key: _pattern(key) for key in keys}
    end, found = time.monotonic() + _SECONDS, {}
    for name, (key, pattern) in product(module_names, patterns.items()):
        if name in found:
            continue
        try:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if pattern.match(name, timeout=left):
                found[name] = key
        except TimeoutError as error:
            raise ValueError(
                f"`alpha_pattern` with keys such as `{printable(key[:100])}` takes longer than {_SECONDS:g} s to be matched; "
                "name modules there"
            ) from error
    return found


def _shown(value: Any) -> str:
    """A value of a config, for an error."""
    return printable(value)[:200]


def _load_base(folder: Path, name: str | None, revision: str | None) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            name or "", revision=revision or "main", dtype="auto", trust_remote_code=False
        )
    # A folder from a stranger makes Transformers and the libraries below raise errors of any type.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"The base model {name!r} of {folder} cannot be loaded ({printable(reason)}): name it with --base-model"
        ) from error


def _try_on(
    model: PreTrainedModel,
    name: str,
    config: BrainstacksConfig,
    tensors: dict[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Attach the stack once, to find errors before anything is written.

    Raises ValueError if a projection is not in the model, cannot carry a stack, or has another shape.
    """
    tuner = StackTuner(model, BrainstacksConfig(target_modules=DUMMY_TARGET_MODULES), "default")
    prefixes = tuner._language_model_prefixes()
    if outside := [module_name for module_name in pairs if not module_name.startswith(prefixes)]:
        raise ValueError(f"Domain {name}: {outside[0]} lies outside the language model, where stacks cover nothing")
    tuner.attach_stack(name, name, config, tensors)
