"""The schema of a library's `manifest.json`: the base model, the stacks in order, the domains, the router, all files."""

from collections import Counter
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from axolotl_brainstacks.guarded import MAX_JSON_BYTES, check_values, parse_json, printable, read
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.entries import (
    CONFIG,
    MOST_STACKS,
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    WEIGHTS,
    DomainEntry,
    Entry,
    FileRecord,
    RelativePath,
    RouterEntry,
    StackEntry,
    StackNumber,
)
from axolotl_brainstacks.names import MANIFEST, ROUTER_FILES, FrozenDtype


class Manifest(Entry):
    """The whole of `manifest.json`.

    frozen_dtype: the dtype of frozen stacks in memory with which all losses were measured; None: the base model's.
    next_stack: the number of the next stack. It only grows, so the name of a removed stack is never used again.
    root: the files that make PEFT load the library as one adapter; a library of an earlier version does not list them.
    records: other files that later commands read, such as the prompts and losses that the router was fitted on, its
        evaluation, and the report; a library of an earlier version does not list them.
    pending: the next record of a file of `records` that is being rewritten. A killed writer leaves the file in either state.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    base: BaseModelInfo
    frozen_dtype: FrozenDtype = None
    stacks: list[StackEntry] = Field(default_factory=list)
    domains: list[DomainEntry] = Field(default_factory=list)
    router: RouterEntry | None = None
    next_stack: StackNumber = 1
    root: dict[RelativePath, FileRecord] = Field(default_factory=dict)
    records: dict[RelativePath, FileRecord] = Field(default_factory=dict)
    pending: dict[RelativePath, FileRecord] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind, entries in (("stack", self.stacks), ("domain", self.domains)):
            counts = Counter(entry.name for entry in entries)
            if twice := [name for name, count in counts.items() if count > 1]:
                raise ValueError(f"{kind} {twice[0]!r} is listed twice")
        # No two domains may list one file, or removing one of them would take the other's file away.
        owner = {stack.name: stack.domain for stack in self.stacks}
        domains = {domain.name for domain in self.domains}
        for stack in self.stacks:
            if stack.domain not in domains:
                raise ValueError(f"stack {stack.name!r} belongs to domain {stack.domain!r}, which is not listed")
            if int(stack.name[1:].partition("_")[0]) >= self.next_stack:
                raise ValueError(f"next_stack is {self.next_stack}, but stack {stack.name!r} exists")
        files: dict[str, str] = {}
        for domain in self.domains:
            if foreign := [name for name in domain.replaced if owner.get(name) != domain.name]:
                raise ValueError(f"domain {domain.name!r} replaces stack {foreign[0]!r}, which is not its own")
            rounds = [*domain.rounds, *(domain.before.rounds if domain.before else [])]
            if foreign := [r.stack for r in rounds if r.stack and owner.get(r.stack) != domain.name]:
                raise ValueError(f"a round of domain {domain.name!r} made stack {foreign[0]!r}, which is not its own")
            for file in domain.files:
                if files.setdefault(file, domain.name) != domain.name:
                    raise ValueError(f"{file} is listed by domains {files[file]!r} and {domain.name!r}")
        if self.router and not self.router.stale and (unknown := set(self.router.domains) - domains):
            raise ValueError(f"the router knows domain {min(unknown)!r}, which is not listed")
        self._check_places()
        return self

    def _check_places(self) -> None:
        """Raises ValueError if a file is listed under the wrong field, where it could pass for a file of another kind."""
        if unknown := self.root.keys() - {CONFIG, WEIGHTS}:
            raise ValueError(f"root lists {min(unknown)}, which is no file of the library as a whole")
        for file in (*self.router_files, *self.records, *self.pending):
            if not file.startswith("router/" if file in self.router_files else ("router/", "report/")):
                raise ValueError(f"{file} is listed among the files of the router or the report")
        if both := self.records.keys() & {*ROUTER_FILES, *self.router_files}:
            raise ValueError(f"{min(both)} is listed twice")
        if extra := self.pending.keys() - self.records.keys():
            raise ValueError(f"{min(extra)} is about to change, but not listed")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a library's manifest. Raises ValueError if it is missing, damaged, or of an unknown schema version."""
        return cls.parse(cls.read_bytes(folder), folder / MANIFEST)

    @staticmethod
    def read_bytes(folder: Path) -> bytes:
        """The content of a library's manifest. Raises ValueError if there is none."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} is not a library (no {MANIFEST}): check the path, or train a library first")
        return read(path)

    @staticmethod
    def check_size(content: bytes) -> None:
        """Raises ValueError if `content` is larger than a manifest that `read` accepts."""
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        check_values(content.decode())

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Self:
        """Parse a manifest; `path` is its name in errors. Raises as `read`."""
        fix = "restore it from a copy of the library, or train into a new folder"
        try:
            data = parse_json(content)
            version = data["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            reason = error if isinstance(error, ValueError) else "it has no schema_version"
            raise ValueError(f"{path} is not the manifest of a library ({reason}): {fix}") from error
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise ValueError(
                f"{path} has schema_version {printable(repr(version)[:100])}, and this axolotl-brainstacks reads up to "
                f"{SCHEMA_VERSION}: install the version that wrote it, `pip install -U axolotl-brainstacks` for the newest"
            )
        try:
            return cls.model_validate(data | {"schema_version": SCHEMA_VERSION})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its entries"
            raise ValueError(printable(f"{path} is damaged at {where} ({first['msg']}): {fix}")) from error

    @property
    def files(self) -> dict[str, FileRecord]:
        """Records of all files of stacks, domains and the router, by path relative to the library."""
        files = {f"stacks/{s.name}/{file}": record for s in self.stacks for file, record in s.files.items()}
        for domain in self.domains:
            files |= domain.files
        return files | self.router_files

    @property
    def covered(self) -> dict[str, FileRecord]:
        """Records of all files that `verify` reads: `files`, `root` and `records`."""
        return self.files | self.root | self.records

    @property
    def router_files(self) -> dict[str, FileRecord]:
        return self.router.files if self.router else {}

    def domain(self, name: str) -> DomainEntry:
        """The entry of a domain. Raises ValueError if there is none of this name."""
        for entry in self.domains:
            if entry.name == name:
                return entry
        known = ", ".join(d.name for d in self.domains) or "no domain yet"
        raise ValueError(f"domain {name!r} is not in the library, which has {known}: check the name")

    def stack(self, name: str) -> StackEntry:
        """The entry of a stack. Raises ValueError if there is none of this name."""
        for entry in self.stacks:
            if entry.name == name:
                return entry
        known = ", ".join(s.name for s in self.stacks) or "no stack yet"
        raise ValueError(f"stack {name!r} is not in the library, which has {known}: check the name")

    def next_stack_name(self, domain: str) -> str:
        """The name that the next stack will have if it belongs to `domain`, such as "s003_math".

        Raises:
            ValueError: if no number is left, which no library reaches by training.
        """
        if self.next_stack >= MOST_STACKS:
            raise ValueError(
                f"next_stack in {MANIFEST} is {self.next_stack}, and no number is left for another stack: restore the manifest "
                "from a copy of the library"
            )
        return f"s{self.next_stack:03d}_{domain}"

    def stacks_of(self, domain: str) -> list[StackEntry]:
        """The stacks of a domain, oldest first; while it is being replaced, the old and the new ones."""
        return [stack for stack in self.stacks if stack.domain == domain]

    def bytes_by_domain(self) -> Counter[str]:
        """The bytes on disk of all files of each domain, its stacks included."""
        sizes = Counter({domain.name: sum(r.bytes for r in domain.files.values()) for domain in self.domains})
        for stack in self.stacks:
            sizes[stack.domain] += sum(record.bytes for record in stack.files.values())
        return sizes

    def bytes_of(self, domain: str) -> int:
        """`bytes_by_domain` of one domain. Raises ValueError as `domain`."""
        return self.bytes_by_domain()[self.domain(domain).name]

    @property
    def active_stacks(self) -> list[StackEntry]:
        """The stacks that answer, in order: all except the new stacks of a domain whose replacement is not complete."""
        new = {s.name for d in self.domains if d.before for s in self.stacks_of(d.name) if s.name not in d.replaced}
        return [stack for stack in self.stacks if stack.name not in new]

    def check_frozen_dtype(self, asked: FrozenDtype) -> None:
        """Raises ValueError if `asked`, the value of `brainstacks.frozen_dtype`, differs from the dtype that the losses of
        these stacks were measured with. A library without stacks accepts any dtype."""
        kept = self.frozen_dtype
        if self.stacks and asked != kept:
            fix = f"set it to {kept}" if kept else "leave the key out"
            raise ValueError(
                f"brainstacks.frozen_dtype is {asked or 'left out'}, but the library's stacks are kept as "
                f"{kept or 'the base model is'}: {fix}, or train into a new library"
            )

    def training_context(self, domain: str, isolated: bool) -> list[str]:
        """The frozen stacks that are on while `domain` trains: the active stacks of all domains before it, and its own.

        A domain that is being replaced keeps its place in the order and starts without its old stacks. A domain that is not
        listed yet comes last.

        Args:
            isolated: the domain trains with its own stacks alone (`context: isolated`).
        """
        names = [entry.name for entry in self.domains]
        before = names[: names.index(domain)] if domain in names else names
        earlier = [] if isolated else [name for name in before if self.domain(name).answers]
        replaced = self.domain(domain).replaced if domain in names else []
        active = {stack.name for stack in self.active_stacks}
        return [
            stack.name
            for stack in self.stacks
            if (stack.domain in earlier and stack.name in active)
            or (stack.domain == domain and stack.name not in replaced)
        ]

    def dependents(self, name: str) -> list[str]:
        """The other domains that were trained with stacks of this one on; without these stacks their losses change."""
        self.domain(name)
        own = {stack.name for stack in self.stacks_of(name)}
        on = {d.name: own.intersection([*d.context, *(d.before.context if d.before else [])]) for d in self.domains}
        return [d.name for d in self.domains if d.name != name and on[d.name]]

    def outdated_protections(self, name: str) -> list[str]:
        """The domains whose protecting columns are outdated once the stacks of `name` are gone.

        These are `name` itself, its `dependents`, and every domain whose columns were fitted orthogonal to outdated ones: part
        of its directions may lie in the columns that are dropped, and would be left without protection.
        """
        lost = {name, *self.dependents(name)}
        # The closure over `beyond`: each turn adds the domains that were fitted orthogonal to one already in the set.
        while more := [d.name for d in self.domains if d.protection and lost.intersection(d.protection.beyond)]:
            if lost.issuperset(more):
                break
            lost.update(more)
        return [d.name for d in self.domains if d.protection and d.name in lost]

    def unprotect(self, name: str) -> None:
        """Drop the columns of `outdated_protections`; the next training run fits them again."""
        for outdated in self.outdated_protections(name):
            self.domain(outdated).protection = None
