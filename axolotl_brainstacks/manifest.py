"""What `manifest.json` of a library says: the base model, the stacks in order, the domains, the router."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from axolotl_brainstacks.args import FrozenDtype
from axolotl_brainstacks.base_model import BaseModelInfo

MANIFEST = "manifest.json"
SCHEMA_VERSION: Final = 1
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
    """One round of residual boosting. Losses are mean validation losses per answer token, in nats."""

    round: int
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
    """The basis a domain was trained against; `energy` is the share of delta energy captured, `capacity_left` the
    smallest share of output dimensions left over all projections."""

    file: RelativePath
    record: FileRecord
    columns: int
    energy: float
    capacity_left: float


class DomainEntry(_Entry):
    """One domain; `context` names the stacks that were on while it trained, its own ones included.

    `validation` is the record of `validation/<name>.safetensors`: the rows that all its losses are measured on. An
    imported domain has none, no round, and NaN for the base's loss.
    """

    name: DomainName
    base_loss: float
    validation: FileRecord | None = None
    context: list[StackName] = []
    rounds: list[RoundRecord] = []
    nullspace: NullSpaceEntry | None = None
    done: bool = False
    soft: bool = False

    @property
    def last_loss(self) -> float:
        """The validation loss after the last round that was kept."""
        return next((r.loss_after for r in reversed(self.rounds) if r.kept), self.base_loss)


class RouterEntry(_Entry):
    """The fitted router; `files` are relative to the library. Stale: a domain was removed or imported since."""

    files: dict[RelativePath, FileRecord]
    domains: list[DomainName]
    stale: bool = False


class Manifest(_Entry):
    """The whole of `manifest.json`. `next_stack` only grows, so the name of a removed stack is never given again.

    `root` lists the files that make PEFT load the library as a whole; older libraries do not list them.
    `frozen_dtype` is what all losses were measured with: the type of frozen stacks in memory, None for the base model's.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
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
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version {version!r}, and this axolotl-brainstacks reads {SCHEMA_VERSION}: "
                "install the version that wrote it, `pip install -U axolotl-brainstacks` for the newest"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its entries"
            raise ValueError(f"{path} is damaged at {where} ({first['msg']}): {mend}") from error

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file that the library answers for, by its path relative to the library."""
        files = {f"stacks/{s.name}/{file}": record for s in self.stacks for file, record in s.files.items()}
        files |= {d.nullspace.file: d.nullspace.record for d in self.domains if d.nullspace}
        files |= {f"validation/{d.name}.safetensors": d.validation for d in self.domains if d.validation}
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

    def dependents(self, name: str) -> list[str]:
        """The other domains that were trained with stacks of this one on, and change when they go."""
        self.domain(name)
        own = {s.name for s in self.stacks if s.domain == name}
        return [d.name for d in self.domains if d.name != name and own.intersection(d.context)]
