"""The tensors of a stack's file, by projection."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = "base_model.model."
OUTPUT = ".brainstacks_B.weight"  # how the name of every B matrix ends
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.brainstacks_(?P<part>[AB])\.weight$")


def stack_pairs(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every projection that the stack `name` covers, by module name.

    Raises:
        ValueError: if a tensor is unknown or has no partner.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ValueError(f"Stack {name}: `{key}` is no tensor of a Brainstacks adapter")
        pairs.setdefault(match["module"], {})[match["part"]] = tensor
    for module_name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"Stack {name}: {module_name} has only its {''.join(pair)} matrix; the file is incomplete")
    return {module_name: (pair["A"], pair["B"]) for module_name, pair in pairs.items()}


def stack_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The inverse: what a stack's file holds."""
    return {
        f"{PREFIX}{module_name}.brainstacks_{side}.weight": tensor
        for module_name, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
