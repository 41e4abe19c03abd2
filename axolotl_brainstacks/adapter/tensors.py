"""The tensors of a stack's file: their names, the pairs that they form, and the values that they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "base_model.model."
OUTPUT = ".brainstacks_B.weight"  # how the name of every B matrix ends
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.brainstacks_(?P<part>[AB])\.weight")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Trained weights are far smaller. With a larger one the activations could overflow, and then also spoil the rows of a batch that
# do not use the stack: their weight is 0, and 0 * inf is NaN.
LARGEST = 1e6


def is_stack_key(key: str) -> bool:
    """Whether a stack's file can have a tensor of this name."""
    return _KEY.fullmatch(key) is not None


def module_of(key: str) -> str | None:
    """The module whose tensor a stack's file has under this name; None if it is no tensor of a stack."""
    match = _KEY.fullmatch(key)
    return match["module"] if match else None


def stack_pairs(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Group the tensors of a stack's file by projection. No value is read, so memory-mapped tensors stay on disk.

    Args:
        name: of the stack, for errors.
        tensors: by the names in the file.

    Returns:
        By module name, A (2 * experts + experts * r, in) and B (out, experts * r).

    Raises:
        ValueError: if a tensor's name is unknown or occurs twice, its dtype is not floating-point, or the other matrix of its
            projection is missing.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"Stack {name}: {key!r} is no tensor of a Brainstacks adapter")
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"Stack {name}: {key!r} is of type {tensor.dtype}, which stacks are not: restore the file from a copy"
            )
        pair = pairs.setdefault(match["module"], {})
        if match["part"] in pair:  # once with PEFT's prefix and once without
            raise ValueError(f"Stack {name}: {key!r} is there twice: restore the file from a copy")
        pair[match["part"]] = tensor
    for module_name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"Stack {name}: {module_name!r} has only its {''.join(pair)} matrix; the file is incomplete"
            )
    return {module_name: (pair["A"], pair["B"]) for module_name, pair in pairs.items()}


def check_values(owner: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Check that all values are finite and not too large. This reads every value once.

    Args:
        owner: what the tensors belong to, for errors.
        tensors: floating-point tensors.
        dtype: dtype that the values will be stored in, which may have a lower limit; None: one that can hold `LARGEST`.

    Raises:
        ValueError: if a value is NaN, infinite, or larger than `LARGEST` or `dtype` allows.
    """
    limit = min(LARGEST, torch.finfo(dtype or torch.float32).max)
    for key, tensor in tensors.items():
        low, high = (float(value) for value in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        # aminmax returns NaN if any value is NaN. Every comparison with NaN is false, so only the negated form rejects it.
        if not (-limit <= low and high <= limit):
            raise ValueError(
                f"{owner}: {key!r} has values from {low:g} to {high:g}, where finite ones up to {limit:g} are possible: "
                "restore the file from a copy"
            )


def stack_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `stack_pairs`: the tensors of a stack's file, by the names that PEFT gives them."""
    return {
        f"{PREFIX}{module_name}.brainstacks_{side}.weight": tensor
        for module_name, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
