"""Checks which domains of another library can join a library, and under which names."""

from collections.abc import Mapping, Sequence

from axolotl_brainstacks.library.library import Library
from axolotl_brainstacks.library.manifest import Manifest
from axolotl_brainstacks.names import DOMAIN_NAME


def joined_names(
    library: Library, other: Library, only: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Choose the domains of `other` that join `library`, and check that they can.

    Args:
        only: names in `other` of the domains to join; all domains if empty.
        renamed: new names in `library`, by the names in `other`.

    Returns:
        The name in `library` of each domain to join, by its name in `other`, in the order of `other`.

    Raises:
        ValueError: if the two have different base models or types of frozen stacks; if a name is unknown, taken or not
            allowed; or if a domain is not finished, or was trained while stacks of another domain were on.
    """
    mine, theirs, renamed = library.manifest, other.manifest, renamed or {}
    if library.path.resolve() == other.path.resolve():
        raise ValueError(f"{other.path} is the library itself: name another one to join")
    if difference := mine.base.difference(theirs.base):
        raise ValueError(
            f"{library.path} was trained on {mine.base.title}, and {other.path} on {theirs.base.title}, which has {difference}: "
            "only libraries on the same base model can be joined; train the domains on it"
        )
    if mine.stacks and mine.frozen_dtype != theirs.frozen_dtype:
        kinds = [
            f"in {dtype}" if dtype else "in the base model's type" for dtype in (mine.frozen_dtype, theirs.frozen_dtype)
        ]
        raise ValueError(
            f"{library.path} keeps its stacks {kinds[0]} (`brainstacks.frozen_dtype`), and {other.path} {kinds[1]}; losses "
            "measured in one type do not hold for the other: train the domains again with the same `frozen_dtype`"
        )
    wanted = [entry.name for entry in theirs.domains if not only or entry.name in only]
    for name in [*only, *renamed]:
        theirs.domain(name)
        if name not in wanted:
            raise ValueError(
                f"--as renames {name!r}, which is not among the domains to join: name it with --domain too"
            )
    if not wanted:
        raise ValueError(f"{other.path} has no domain to join: train one into it first")
    _check_joinable(other, wanted)
    names = {old: renamed.get(old, old) for old in wanted}
    _check_names(library, names)
    return names


def _check_joinable(other: Library, wanted: Sequence[str]) -> None:
    entries = [other.manifest.domain(name) for name in wanted]
    if unfinished := [entry.name for entry in entries if not entry.done]:
        raise ValueError(
            f"{other.path} has not finished {', '.join(unfinished)}: run `axolotl train` on its config until the end, or choose "
            "other domains with --domain"
        )
    if foreign := {entry.name: found for entry in entries if (found := _foreign_stacks(other.manifest, entry.name))}:
        listed = "; ".join(f"{name} on top of {', '.join(stacks)}" for name, stacks in foreign.items())
        raise ValueError(
            f"{other.path} has trained {listed}: without these stacks of another domain it would not answer the same. Train it "
            "into a library with `brainstacks.context: isolated` and join that, or choose other domains with --domain"
        )


def _foreign_stacks(manifest: Manifest, name: str) -> list[str]:
    """Stacks in the context of domain `name` that belong to other domains, those removed since included."""
    own = {stack.name for stack in manifest.stacks_of(name)}
    return [stack for stack in manifest.domain(name).context if stack not in own]


def _check_names(library: Library, names: Mapping[str, str]) -> None:
    taken = [entry.name for entry in library.manifest.domains]
    for old, new in names.items():
        if not DOMAIN_NAME.fullmatch(new):
            raise ValueError(
                f"--as {new}={old}: `{new}` cannot be a domain's name; use lower-case letters, digits and _, a letter first"
            )
        if new in taken:
            raise ValueError(
                f"{library.path} would have two domains `{new}`: give the one that joins another name with --as NEW={old}"
            )
        taken.append(new)
