"""What `manifest.json` of a library says: the base model, the stacks in order, the domains, the router."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from axolotl_brainstacks.args import FrozenDtype
from axolotl_brainstacks.base_model import BaseModelInfo

MANIFEST = "manifest.json"
SCHEMA_VERSION: Final = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
DOMAIN_PATTERN = r"^[a-z][a-z0-9_]{0,31}$"
STACK_PATTERN = r"^s[0-9]{3,}_[a-z][a-z0-9_]{0,31}$"


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"path {path!r} is not a relative path inside the library")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
DomainName = Annotated[str, Field(pattern=DOMAIN_PATTERN)]
StackName = Annotated[str, Field(pattern=STACK_PATTERN)]


class _Entry(BaseModel):
    # A round that diverged has a NaN loss; plain JSON has no number for it and Pydantic's default writes null.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class FileRecord(_Entry):
    """Size in bytes and SHA-256 (hex) of one file."""

    sha256: str
    bytes: int


class RoundRecord(_Entry):
    """One round: of residual boosting, or `rl`, of preference or reinforcement learning.

    Losses are mean validation losses of the domain per answer token, in nats. The objectives of an RL round are what its
    trainer measures on held-out rows: the preference loss, or the mean reward. `dropped` says why a round was not kept.
    """

    round: int
    rl: str | None = None
    objective_before: float | None = None
    objective_after: float | None = None
    dropped: str | None = None
    kept: bool
    stack: StackName | None = None
    loss_before: float
    loss_after: float
    steps: int
    stop_reason: str
    metrics: dict[str, float] = {}


class StackEntry(_Entry):
    """One frozen stack; `files` are relative to its folder `stacks/<name>`."""

    name: StackName
    domain: DomainName
    round: int
    files: dict[RelativePath, FileRecord]


class NullSpaceEntry(_Entry):
    """Columns that protect one domain's output directions, fitted `beyond` the columns of other domains.

    columns: the most that a projection has. energy: share of the domain's delta energy that these columns and those of
    `beyond` hold. capacity_left: smallest share of a projection's output dimensions that was left then.
    """

    file: RelativePath
    record: FileRecord
    columns: int
    energy: float
    capacity_left: float
    beyond: list[DomainName] = []


class ConstraintRecord(_Entry):
    """What a domain was kept out of while it trained: the union of the columns that protect the domains `protects`.

    columns: the most of a projection. energy, energies: share of the protected domains' delta energy in the union,
    together and each. capacity: by kind of projection (`q_proj`), the smallest share of output dimensions left;
    capacity_left: the smallest of all, in the projection `tightest`.
    """

    protects: list[DomainName]
    columns: int
    energy: float
    energies: dict[DomainName, float]
    capacity_left: float
    tightest: str
    capacity: dict[str, float]


class DomainEntry(_Entry):
    """One domain; `context` names the stacks that were on while it trained, its own ones included.

    `validation` is the record of `validation_path`. All losses of the domain are measured on the first `eval_rows` of its
    rows (None: on all); the rest serves to fit what protects it. An imported domain has no rows, no round, and NaN for the
    base's loss.

    protection: the columns that keep later training out of this domain's directions; fitted when they are first needed.
    constraint: the columns of other domains that this one trained against.
    nullspace: what a library of schema 1 has in place of both; its columns are used no more.
    replaced, before: while the domain is trained again in place, its old stacks, which go on answering, and its old entry.
    """

    name: DomainName
    base_loss: float
    validation: FileRecord | None = None
    eval_rows: int | None = None
    validation_file: RelativePath | None = None
    context: list[StackName] = []
    rounds: list[RoundRecord] = []
    protection: NullSpaceEntry | None = None
    constraint: ConstraintRecord | None = None
    nullspace: NullSpaceEntry | None = None
    done: bool = False
    soft: bool = False
    replaced: list[StackName] = []
    before: "DomainEntry | None" = None

    @property
    def last_loss(self) -> float:
        """The validation loss after the last round that was kept."""
        return next((r.loss_after for r in reversed(self.rounds) if r.kept), self.base_loss)

    @property
    def validation_path(self) -> str:
        return self.validation_file or f"validation/{self.name}.safetensors"

    @property
    def answers(self) -> bool:
        """Whether its stacks may be routed to: it is finished, or was before it began to be trained again."""
        return self.done or self.before is not None

    @property
    def files(self) -> dict[str, FileRecord]:
        """Its own files but for the stacks', by path relative to the library."""
        files = {fit.file: fit.record for fit in (self.protection, self.nullspace) if fit}
        files |= {self.validation_path: self.validation} if self.validation else {}
        return files | (self.before.files if self.before else {})


class RouterEntry(_Entry):
    """The fitted router; `files` are relative to the library. Stale: a domain was added, removed or replaced since."""

    files: dict[RelativePath, FileRecord]
    domains: list[DomainName]
    stale: bool = False


class Manifest(_Entry):
    """The whole of `manifest.json`. `next_stack` only grows, so the name of a removed stack is never given again.

    `root` lists the files that make PEFT load the library as a whole; older libraries do not list them.
    `frozen_dtype` is what all losses were measured with: the type of frozen stacks in memory, None for the base model's.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    base: BaseModelInfo
    frozen_dtype: FrozenDtype = None
    stacks: list[StackEntry] = []
    domains: list[DomainEntry] = []
    router: RouterEntry | None = None
    next_stack: int = 1
    root: dict[RelativePath, FileRecord] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stacks = [s.name for s in self.stacks]
        domains = [d.name for d in self.domains]
        for kind, names in (("stack", stacks), ("domain", domains)):
            if twice := {n for n in names if names.count(n) > 1}:
                raise ValueError(f"{kind} {min(twice)!r} is listed twice")
        for stack in self.stacks:
            if stack.domain not in domains:
                raise ValueError(f"stack {stack.name!r} belongs to domain {stack.domain!r}, which is not listed")
            if int(stack.name[1:].partition("_")[0]) >= self.next_stack:
                raise ValueError(f"next_stack is {self.next_stack}, but stack {stack.name!r} exists")
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a library's manifest. Raises ValueError when it is missing, damaged, or of another schema version."""
        path = folder / MANIFEST
        mend = "restore it from a copy of the library, or train into a new folder"
        if not path.is_file():
            raise ValueError(f"{folder} is not a library (no {MANIFEST}): check the path, or train a library first")
        try:
            data = json.loads(path.read_bytes())
            version = data["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the manifest of a library ({error!r}): {mend}") from error
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{path} has schema_version {version!r}, and this axolotl-brainstacks reads up to {SCHEMA_VERSION}: "
                "install the version that wrote it, `pip install -U axolotl-brainstacks` for the newest"
            )
        try:
            return cls.model_validate(data | {"schema_version": SCHEMA_VERSION})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its entries"
            raise ValueError(f"{path} is damaged at {where} ({first['msg']}): {mend}") from error

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file that the library answers for, by its path relative to the library."""
        files = {f"stacks/{s.name}/{file}": record for s in self.stacks for file, record in s.files.items()}
        for domain in self.domains:
            files |= domain.files
        return files | self.router_files

    @property
    def router_files(self) -> dict[str, FileRecord]:
        return self.router.files if self.router else {}

    def domain(self, name: str) -> DomainEntry:
        for entry in self.domains:
            if entry.name == name:
                return entry
        known = ", ".join(d.name for d in self.domains) or "no domain yet"
        raise ValueError(f"domain {name!r} is not in the library, which has {known}: check the name")

    def stack(self, name: str) -> StackEntry:
        for entry in self.stacks:
            if entry.name == name:
                return entry
        known = ", ".join(s.name for s in self.stacks) or "no stack yet"
        raise ValueError(f"stack {name!r} is not in the library, which has {known}: check the name")

    def next_stack_name(self, domain: str) -> str:
        return f"s{self.next_stack:03d}_{domain}"

    def stacks_of(self, domain: str) -> list[StackEntry]:
        return [stack for stack in self.stacks if stack.domain == domain]

    def bytes_of(self, domain: str) -> int:
        """What all files of a domain take on disk."""
        records = [record for stack in self.stacks_of(domain) for record in stack.files.values()]
        return sum(record.bytes for record in [*records, *self.domain(domain).files.values()])

    @property
    def active_stacks(self) -> list[StackEntry]:
        """The stacks to answer with, in order: all but the new ones of a domain that is still being trained again."""
        new = {s.name for d in self.domains if d.before for s in self.stacks_of(d.name) if s.name not in d.replaced}
        return [stack for stack in self.stacks if stack.name not in new]

    def training_context(self, domain: str, isolated: bool) -> list[str]:
        """The frozen stacks that are on while `domain` trains: those that answer for the domains before it, and its own.

        A domain that is trained again stays where it was in the order and starts without its old stacks; one that is not
        listed yet comes last. With `isolated`, its own stacks alone.
        """
        names = [entry.name for entry in self.domains]
        earlier = [] if isolated else names[: names.index(domain)] if domain in names else names
        replaced = self.domain(domain).replaced if domain in names else []
        active = {stack.name for stack in self.active_stacks}
        return [
            stack.name
            for stack in self.stacks
            if (stack.domain in earlier and stack.name in active)
            or (stack.domain == domain and stack.name not in replaced)
        ]

    def dependents(self, name: str) -> list[str]:
        """The other domains that were trained with stacks of this one on, and change when they go."""
        self.domain(name)
        own = {stack.name for stack in self.stacks_of(name)}
        return [d.name for d in self.domains if d.name != name and own.intersection(d.context)]

    def outdated_protections(self, name: str) -> list[str]:
        """The protected domains whose columns no longer hold what they should once the stacks of `name` are gone.

        These are its own, those of domains that had its stacks on, and all that were fitted beyond any of them: what
        they protect may lie in columns that go.
        """
        lost = {name, *self.dependents(name)}
        while more := [d.name for d in self.domains if d.protection and lost.intersection(d.protection.beyond)]:
            if lost.issuperset(more):
                break
            lost.update(more)
        return [d.name for d in self.domains if d.protection and d.name in lost]

    def unprotect(self, name: str) -> None:
        """Drop `outdated_protections`; whatever trains next fits them again."""
        for outdated in self.outdated_protections(name):
            self.domain(outdated).protection = None
