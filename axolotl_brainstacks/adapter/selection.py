"""Which stacks are on: the selection that a caller chose, the one that the layers have, and the lock that guards both."""

from __future__ import annotations

import _thread
from dataclasses import dataclass

from torch import Tensor


class ModelLock(_thread.RLock):  # type: ignore[misc]  # at run time it can be subclassed
    """A re-entrant lock that can be copied and pickled with its model; the copy gets a new, free lock.

    It subclasses the C implementation: a `with` block then enters and leaves it in one step, and no signal handler can raise
    an exception between taking the lock and guarding it.
    """

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()


@dataclass(frozen=True)
class FrozenStack:
    """A stack that is attached to the model.

    Attributes:
        name: in the library.
        domain: that it was trained for.
    """

    name: str
    domain: str


@dataclass(frozen=True, eq=False)
class Selection:
    """The stacks that are on; all others are off.

    Attributes:
        names: of the stacks.
        weights: (rows, names), factor of each stack for each row of the batch; None for 1 everywhere.
        mode: as in `LibraryTuner.mode`.
    """

    names: tuple[str, ...] = ()
    weights: Tensor | None = None
    mode: str = "auto"


class SelectionState:
    """The attached stacks and the selection of those that are on.

    Every change assigns a whole new object to an attribute. That is one step, so an interrupt leaves the old value or the new
    one and never a mixture.

    Attributes:
        stacks: all attached stacks, oldest first.
        wanted: the selection that forwards must use. A temporary change ends by assigning the old object again; the next
            forward then switches the layers.
        applied: the selection that all layers have; None while they are switched, and after an interrupt during that time.
    """

    def __init__(self) -> None:
        self.stacks: tuple[FrozenStack, ...] = ()
        self.wanted = Selection()
        self.applied: Selection | None = self.wanted

    @property
    def settled(self) -> bool:
        """Whether all layers have the wanted selection."""
        return self.applied is self.wanted
