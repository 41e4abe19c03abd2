"""A finished domain is trained again in place: its old stacks answer until the new ones are complete.

These are changes to a manifest alone; `Library` commits each as one.
"""

from collections.abc import Sequence

from axolotl_brainstacks.library.manifest import DomainEntry, Manifest


def check(manifest: Manifest, name: str) -> None:
    """Raises ValueError unless the domain can be replaced: it has to be finished."""
    entry = manifest.domain(name)
    if entry.before is not None:
        raise ValueError(f"domain {name!r} is being replaced already: run `axolotl train`, or take it back with --undo")
    if not entry.done:
        raise ValueError(
            f"domain {name!r} is not finished, so there is nothing to replace: `axolotl train` goes on with it"
        )


def begin(manifest: Manifest, name: str) -> None:
    """Mark the domain as one to be trained again. Raises as `check` does."""
    check(manifest, name)
    # What protects domains trained on top of it holds directions of its old stacks, which it has to be free to use again.
    manifest.unprotect(name)
    entry = manifest.domain(name)
    entry.before = entry.model_copy(deep=True, update={"protection": None})
    entry.replaced = [stack.name for stack in manifest.stacks_of(name)]
    entry.done, entry.rounds, entry.context, entry.constraint = False, [], [], None


def undo(manifest: Manifest, name: str) -> None:
    """Put the domain back as it was; new stacks are dropped. Raises ValueError when it is not being replaced.

    What protects it and the domains on top of it is fitted again by the next training.
    """
    entry = manifest.domain(name)
    if entry.before is None:
        raise ValueError(f"domain {name!r} is not being replaced, so there is nothing to undo")
    manifest.unprotect(name)
    manifest.stacks = [s for s in manifest.stacks if s.domain != name or s.name in entry.replaced]
    manifest.domains[manifest.domains.index(entry)] = entry.before


def finish(manifest: Manifest, name: str) -> None:
    """Close a domain after its last round.

    Of one that was trained again, the old stacks go and the new ones take their place in other domains' contexts. If no
    new stack was kept there is nothing to replace the old ones with: the domain is what it was.
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
    """In the context of `entry`, put all of `new` where the first of `old` stands; the rest of `old` goes."""
    places = [place for place, stack in enumerate(entry.context) if stack in old]
    if places:
        kept_before = entry.context[: places[0]]
        entry.context = [*kept_before, *new, *(stack for stack in entry.context[places[0] :] if stack not in old)]
