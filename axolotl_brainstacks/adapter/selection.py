"""Which stacks are on: what someone chose, what the layers were last set to, and the lock that guards both."""

from __future__ import annotations

import _thread
from dataclasses import dataclass

from torch import Tensor


class ModelLock(_thread.RLock):  # type: ignore[misc]  # at run time it can be subclassed
    """A re-entrant lock that goes with a model: a copy of the model gets a free lock of its own.

    It is entered and left by compiled code, so that no signal can come between the two.
    """

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()


@dataclass(frozen=True)
class FrozenStack:
    """A stack attached to the model: its name in the library and the domain it belongs to."""

    name: str
    domain: str


@dataclass(frozen=True, eq=False)
class Selection:
    """The stacks `names` are on, with `weights` (rows, names) or 1 everywhere; `mode` as in `BrainstacksModel.mode`."""

    names: tuple[str, ...] = ()
    weights: Tensor | None = None
    mode: str = "auto"


class SelectionState:
    """What is attached and what is on. Each attribute is replaced whole, in one step that no interrupt can split.

    Attributes:
        stacks: attached, oldest first.
        wanted: what forwards compute with. Who changes it for a while puts the old object back, and nothing else: the
            next forward switches the layers.
        applied: what all layers are set to; None while they are being changed, and after an interrupt at that time.
    """

    def __init__(self) -> None:
        self.stacks: tuple[FrozenStack, ...] = ()
        self.wanted = Selection()
        self.applied: Selection | None = self.wanted

    @property
    def settled(self) -> bool:
        return self.applied is self.wanted
