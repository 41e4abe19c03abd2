"""The entries of a manifest: what it says about each file, stack, round, domain and the router."""

from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from axolotl_brainstacks.names import DOMAIN_NAME

# The two files that PEFT reads, of a stack and of the library as a whole.
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SCHEMA_VERSION: Final = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
DOMAIN_PATTERN = rf"^{DOMAIN_NAME.pattern}$"
STACK_PATTERN = rf"^s[0-9]{{3,12}}_{DOMAIN_NAME.pattern}$"


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"path {path!r} is not a relative path inside the library")
    # Each file has one allowed spelling, so that no two records can describe the same file.
    if str(pure) != path or not path.isprintable() or len(path) > 512:
        raise ValueError(f"path {path!r} is not written as a library writes it")
    return path


def _in_folder(folder: str) -> AfterValidator:
    def check(path: str) -> str:
        if PurePosixPath(path).parts[0] != folder or len(PurePosixPath(path).parts) != 2:
            raise ValueError(f"path {path!r} is not that of a file in {folder}/")
        return path

    return AfterValidator(check)


def _number(value: Any) -> Any:
    """A float that a manifest holds as a string, because JSON has no number for it."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


RelativePath = Annotated[str, AfterValidator(_inside)]
DomainName = Annotated[str, Field(pattern=DOMAIN_PATTERN)]
StackName = Annotated[str, Field(pattern=STACK_PATTERN)]
Count = Annotated[int, Field(ge=0, le=10**15)]
# The number of a stack. Names have up to twelve digits.
MOST_STACKS: Final = 10**9
StackNumber = Annotated[int, Field(ge=0, le=MOST_STACKS)]
# A loss, in nats per answer token. It may be NaN or infinite, as after a round that diverged.
Loss = Annotated[float, BeforeValidator(_number)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Entry(BaseModel):
    # `strict` rejects true and "7" as numbers. Without `ser_json_inf_nan` Pydantic writes null for NaN.
    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="strings")


class FileRecord(Entry):
    """Size in bytes and SHA-256 (hex) of one file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: Count


class RoundRecord(Entry):
    """One round: a supervised one of residual boosting (`rl` is None), or an RL round of kind `rl`.

    round: its number in the domain, from 1.
    loss_before, loss_after: the domain's mean validation loss, in nats per answer token.
    objective_before, objective_after: of an RL round, what its trainer measures on held-out examples: the preference loss or
        the mean reward.
    kept, stack: whether the round's stack was added to the library, and its name.
    dropped: why the round was not kept.
    stop_reason: why training ended, such as "finished", "patience" or "spike".
    """

    round: Count
    rl: str | None = None
    objective_before: Loss | None = None
    objective_after: Loss | None = None
    dropped: str | None = None
    kept: bool
    stack: StackName | None = None
    loss_before: Loss
    loss_after: Loss
    steps: Count
    stop_reason: str
    metrics: dict[str, Loss] = {}

    @model_validator(mode="after")
    def _objective_is_whole(self) -> Self:
        if self.objective_after is not None and self.objective_before is None:
            raise ValueError(f"round {self.round} has an objective_after, but no objective_before")
        return self


class StackEntry(Entry):
    """One frozen stack; `files` are relative to its folder `stacks/<name>`."""

    name: StackName
    domain: DomainName
    round: Count
    files: dict[RelativePath, FileRecord]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if missing := {CONFIG, WEIGHTS} - self.files.keys():
            raise ValueError(f"stack {self.name!r} lists no {min(missing)}")
        return self


class NullSpaceEntry(Entry):
    """Columns that protect one domain's output directions (arXiv 2604.01152, null space).

    beyond: the domains whose columns these are orthogonal to.
    columns: the largest number of columns of a projection.
    energy: share of the energy of the domain's output deltas that lies in these columns and those of `beyond`.
    capacity_left: the smallest share of a projection's output dimensions that was left for new domains.
    """

    file: Annotated[RelativePath, _in_folder("nullspace")]
    record: FileRecord
    columns: Count
    energy: Finite
    capacity_left: Finite
    beyond: list[DomainName] = []


class ConstraintRecord(Entry):
    """The union of columns that a domain was trained against: those that protect the domains `protects`.

    columns: the largest number of columns of a projection.
    energy, energies: share of the energy of the protected domains' output deltas that lies in the union, of all of these
        domains together and of each.
    capacity: the smallest share of output dimensions that was left, by kind of projection (`q_proj`).
    capacity_left, tightest: the smallest share of all, and the module name of its projection.
    """

    protects: list[DomainName]
    columns: Count
    energy: Finite
    energies: dict[DomainName, Finite]
    capacity_left: Finite
    tightest: str
    capacity: dict[str, Finite]


class DomainEntry(Entry):
    """One domain. An imported domain has no validation examples and no rounds, and NaN for `base_loss`.

    base_loss: validation loss of the base model alone, in nats per answer token.
    validation: the record of `validation_path`, the packed validation examples.
    eval_rows: how many of the examples, from the first, losses are measured on (None: all). The others only help to fit
        `protection`.
    context: the stacks that were on while the domain trained, its own included.
    protection: the columns that keep later training out of this domain's directions; fitted when first needed.
    constraint: the columns of other domains that this one was trained against.
    nullspace: in a library of schema 1, what stands in place of these two; its columns are no longer used.
    done: whether all of its rounds are over.
    soft: whether the router's targets count it half, as `brainstacks.router.soft_domains` asks.
    replaced, before: while the domain is trained again, its old stacks, which go on answering, and its old entry.
    """

    name: DomainName
    base_loss: Loss
    validation: FileRecord | None = None
    eval_rows: Count | None = None
    validation_file: Annotated[RelativePath, _in_folder("validation")] | None = None
    context: list[StackName] = []
    rounds: list[RoundRecord] = []
    protection: NullSpaceEntry | None = None
    constraint: ConstraintRecord | None = None
    nullspace: NullSpaceEntry | None = None
    done: bool = False
    soft: bool = False
    replaced: list[StackName] = []
    before: "DomainEntry | None" = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.before and (self.before.name != self.name or self.before.before):
            raise ValueError(f"domain {self.name!r} has a `before` that is not an entry of this domain")
        entries = [entry for entry in (self, self.before) if entry]
        fits = [fit for entry in entries for fit in (entry.protection, entry.nullspace) if fit]
        records = [(fit.file, fit.record) for fit in fits]
        records += [(entry.validation_path, entry.validation) for entry in entries if entry.validation]
        for file, record in records:
            if self.files[file] != record:
                raise ValueError(f"{file} is listed twice")
        return self

    @property
    def last_loss(self) -> float:
        """The validation loss after the last round that was kept."""
        return next((r.loss_after for r in reversed(self.rounds) if r.kept), self.base_loss)

    @property
    def validation_path(self) -> str:
        """Path of the packed validation examples, relative to the library."""
        return self.validation_file or f"validation/{self.name}.safetensors"

    @property
    def answers(self) -> bool:
        """Whether a router may choose its stacks: it is finished, or was until its replacement began."""
        return self.done or self.before is not None

    @property
    def files(self) -> dict[str, FileRecord]:
        """Records of its files by path relative to the library, without those of its stacks."""
        files = {fit.file: fit.record for fit in (self.protection, self.nullspace) if fit}
        files |= {self.validation_path: self.validation} if self.validation else {}
        return files | (self.before.files if self.before else {})


class RouterEntry(Entry):
    """The fitted router.

    files: the files that it answers from, by path relative to the library.
    domains: the domains that it chooses among, in the order of its outputs.
    stale: whether a domain was added, removed or replaced since it was fitted.
    """

    files: dict[RelativePath, FileRecord]
    domains: list[DomainName]
    stale: bool = False
