"""The tensors of a stack's file, by projection."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "base_model.model."
OUTPUT = ".brainstacks_B.weight"  # how the name of every B matrix ends
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.brainstacks_(?P<part>[AB])\.weight")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# No trained weight comes near. A larger one could overflow in rows of a batch that do not use the stack: they compute its
# activations too, times 0.
LARGEST = 1e6


def is_stack_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None


def stack_pairs(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every projection that the stack `name` covers, by module name; no value is read.

    Raises:
        ValueError: if a tensor is unknown, there twice or no floating-point number, or has no partner.
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
        if match["part"] in pair:
            raise ValueError(f"Stack {name}: {key!r} is there twice: restore the file from a copy")
        pair[match["part"]] = tensor
    for module_name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"Stack {name}: {module_name!r} has only its {''.join(pair)} matrix; the file is incomplete"
            )
    return {module_name: (pair["A"], pair["B"]) for module_name, pair in pairs.items()}


def check_values(owner: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Read all values once.

    Args:
        dtype: what they will be kept as; None for a type that holds `LARGEST`.

    Raises:
        ValueError: for a NaN, an infinity, or a value that is too large.
    """
    limit = min(LARGEST, torch.finfo(dtype or torch.float32).max)
    for key, tensor in tensors.items():
        low, high = (float(value) for value in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        # Not `high > limit`: aminmax hands a NaN on, and every comparison with it is false.
        if not (-limit <= low and high <= limit):
            raise ValueError(
                f"{owner}: {key!r} has values from {low:g} to {high:g}, where finite ones up to {limit:g} are possible: "
                "restore the file from a copy"
            )


def stack_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The inverse: what a stack's file holds."""
    return {
        f"{PREFIX}{module_name}.brainstacks_{side}.weight": tensor
        for module_name, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
