"""Training a finished domain again in place: its old stacks answer until the new ones are complete.

The functions here change a manifest in memory; `Library` commits each change at once.
"""

from collections.abc import Sequence

from axolotl_brainstacks.library.entries import DomainEntry
from axolotl_brainstacks.library.manifest import Manifest


def check(manifest: Manifest, name: str) -> None:
    """Raises ValueError unless the domain is finished and not being replaced already."""
    entry = manifest.domain(name)
    if entry.before is not None:
        raise ValueError(f"domain {name!r} is being replaced already: run `axolotl train`, or take it back with --undo")
    if not entry.done:
        raise ValueError(
            f"domain {name!r} is not finished, so there is nothing to replace: `axolotl train` goes on with it"
        )


def begin(manifest: Manifest, name: str) -> None:
    """Mark the domain to be trained again. Raises as `check` does."""
    check(manifest, name)
    # The columns that protect domains trained on top of this one contain directions of its old stacks. The domain has to
    # be free to use these directions again, so all such columns are dropped and fitted again.
    manifest.unprotect(name)
    entry = manifest.domain(name)
    entry.before = entry.model_copy(deep=True, update={"protection": None})
    entry.replaced = [stack.name for stack in manifest.stacks_of(name)]
    entry.done, entry.rounds, entry.context, entry.constraint = False, [], [], None


def undo(manifest: Manifest, name: str) -> None:
    """Restore the domain as it was, without its new stacks. Raises ValueError if it is not being replaced.

    The next training run fits the columns again that protect it and the domains trained on top of it.
    """
    entry = manifest.domain(name)
    if entry.before is None:
        raise ValueError(f"domain {name!r} is not being replaced, so there is nothing to undo")
    manifest.unprotect(name)
    manifest.stacks = [s for s in manifest.stacks if s.domain != name or s.name in entry.replaced]
    manifest.domains[manifest.domains.index(entry)] = entry.before


def finish(manifest: Manifest, name: str) -> None:
    """Mark a domain as finished after its last round.

    If it is being replaced, its new stacks replace the old ones, also in the contexts of other domains. If no new stack was
    kept, the domain is restored as it was.
    """
    entry = manifest.domain(name)
    if entry.before is None:
        entry.done = True
        return
    old = entry.replaced
    new = [stack.name for stack in manifest.stacks_of(name) if stack.name not in old]
    if not new:
        return undo(manifest, name)
    manifest.unprotect(name)
    for other in manifest.domains:
        for state in (other, other.before):
            if state is not None and other is not entry:
                _substitute(state, old, new)
    manifest.stacks = [stack for stack in manifest.stacks if stack.name not in old]
    entry.done, entry.replaced, entry.before = True, [], None
    if manifest.router:
        manifest.router.stale = True


def _substitute(entry: DomainEntry, old: Sequence[str], new: Sequence[str]) -> None:
    """In the context of `entry`, replace the first stack of `old` by all of `new`, and remove the others of `old`."""
    places = [place for place, stack in enumerate(entry.context) if stack in old]
    if places:
        kept_before = entry.context[: places[0]]
        entry.context = [*kept_before, *new, *(stack for stack in entry.context[places[0] :] if stack not in old)]
