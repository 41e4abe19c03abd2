"""The library on disk: its domains and their frozen stacks, added, replaced, joined and removed."""

from pathlib import Path
from typing import Any, Self

from torch import Tensor

from axolotl_brainstacks.guarded import load_tensors, parse_json, printable
from axolotl_brainstacks.library import replacement
from axolotl_brainstacks.library.folder import CONFIG, STAGE, WEIGHTS
from axolotl_brainstacks.library.manifest import BaseModelInfo as BaseModelInfo
from axolotl_brainstacks.library.manifest import (
    DomainEntry,
    Manifest,
    NullSpaceEntry,
    RoundRecord,
    RouterEntry,
    StackEntry,
)
from axolotl_brainstacks.library.records import LibraryRecords
from axolotl_brainstacks.library.storage import (
    copy_durably,
    json_to_bytes,
    record_of,
    sync_folder,
    tensors_to_bytes,
    write_durably,
)
from axolotl_brainstacks.names import FrozenDtype


class Library(LibraryRecords):
    """A library's content. Every method that changes it asserts that it runs inside `writing()`."""

    def add_domain(self, entry: DomainEntry, validation: bytes | None = None) -> None:
        """List a domain, with the rows (`evaluation.pack_rows`) that its losses are measured on."""
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            if validation is not None:
                entry.validation = self._put(f"validation/{entry.name}.safetensors", validation)

    def import_domain(self, entry: DomainEntry, config: dict[str, Any], tensors: dict[str, Tensor]) -> StackEntry:
        """List a domain together with its only stack, trained elsewhere; the router is stale then. Arguments and errors
        as `add_stack`."""
        data = _stack_files(entry.name, config, tensors)
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            stack = self._put_stack(manifest, entry.name, 1, data)
            entry.context = [stack.name]
            if manifest.router:
                manifest.router.stale = True
        return stack

    def update_domain(self, name: str, **changes: Any) -> DomainEntry:
        assert "name" not in changes, "stacks carry their domain's name"
        with self._changing() as manifest:
            entry = DomainEntry.model_validate(manifest.domain(name).model_dump() | changes)
            manifest.domains[manifest.domains.index(manifest.domain(name))] = entry
        return entry

    def record_round(self, domain: str, record: RoundRecord) -> None:
        """Note a round whose stack was not kept."""
        assert not record.kept and record.stack is None, record
        with self._changing() as manifest:
            manifest.domain(domain).rounds.append(record)

    def add_stack(
        self,
        domain: str,
        round: int,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        record: RoundRecord,
        context: list[str] | None = None,
    ) -> StackEntry:
        """Freeze a stack: a plain PEFT folder `stacks/<name>`, listed last in the manifest with its round's record.

        `config` is the PEFT config (sets become sorted lists), `tensors` the adapter's state dict on any device,
        `context` the stacks that were on while it trained; its own name is added. Raises
        ValueError for a non-finite tensor or an all-zero B, OSError when the disk is full; then nothing has changed.
        """
        assert record.kept and record.round == round, record
        data = _stack_files(domain, config, tensors)
        with self._changing() as manifest:
            entry = self._put_stack(manifest, domain, round, data)
            manifest.domain(domain).rounds.append(record.model_copy(update={"stack": entry.name}))
            manifest.domain(domain).context = [*(context or []), entry.name]
        return entry

    def write_protection(
        self, domain: str, tensors: dict[str, Tensor], energy: float, capacity_left: float, beyond: list[str]
    ) -> NullSpaceEntry:
        """Keep the columns that protect `domain`, (out, d) by projection, in place of older ones. Raises as `add_stack`.

        `energy`, `capacity_left` and `beyond` as in `NullSpaceEntry`.
        """
        data = tensors_to_bytes(tensors, f"the null space of domain {domain!r}")
        # Named by content: the file that the manifest lists now is never overwritten.
        file = f"nullspace/{domain}-{record_of(data).sha256[:12]}.safetensors"
        with self._changing() as manifest:
            entry = NullSpaceEntry(
                file=file,
                record=self._put(file, data),
                columns=max((basis.shape[1] for basis in tensors.values()), default=0),
                energy=energy,
                capacity_left=capacity_left,
                beyond=beyond,
            )
            manifest.domain(domain).protection = entry
        return entry

    def unprotect(self, domain: str) -> None:
        """Drop the columns that protect `domain`, and all that were fitted with a view to them."""
        with self._changing() as manifest:
            manifest.unprotect(domain)

    def set_router(self, entry: RouterEntry | None) -> None:
        with self._changing() as manifest:
            manifest.router = entry

    def set_frozen_dtype(self, dtype: FrozenDtype) -> None:
        """Say how stacks are kept in memory, before there is one."""
        if self.manifest.frozen_dtype != dtype:
            assert not self.manifest.stacks
            with self._changing() as manifest:
                manifest.frozen_dtype = dtype

    def complete_base(self, base: BaseModelInfo) -> None:
        """Record what an earlier version did not of the base model, from `base`, which has been checked against it."""
        if self.manifest.base.weights is None:
            with self._changing() as manifest:
                manifest.base = manifest.base.completed(base)

    def write_root_config(self, config: dict[str, Any]) -> None:
        """Make the library itself a folder that `PeftModel.from_pretrained(base, library)` accepts."""
        data = {WEIGHTS: tensors_to_bytes({}, "the library"), CONFIG: json_to_bytes(config)}
        records = {file: record_of(content) for file, content in data.items()}
        if self.manifest.root == records and not self._problems(records):
            return
        with self._changing() as manifest:  # a kill before the end leaves files that nothing is expected of
            manifest.root = {}
        with self._changing() as manifest:
            manifest.root = {file: self._put(file, content) for file, content in data.items()}

    def remove_domain(self, name: str) -> list[str]:
        """Remove a domain with its stacks and what protects it; the router is stale then. Returns its dependents."""
        self.manifest.domain(name)
        self.drop_file(f"router/prompts/{name}.safetensors")  # the domain's next data may be trained on them
        with self._changing() as manifest:
            dependents = manifest.dependents(name)
            manifest.unprotect(name)
            manifest.domains.remove(manifest.domain(name))
            manifest.stacks = [s for s in manifest.stacks if s.domain != name]
            if manifest.router:
                manifest.router.stale = True
        return dependents

    def replace_domain(self, name: str) -> list[str]:
        """Have a finished domain trained again; its old stacks answer until then. Returns its dependents."""
        with self._changing() as manifest:
            dependents = manifest.dependents(name)
            replacement.begin(manifest, name)
        return dependents

    def renew_validation(self, name: str, base_loss: float, rows: bytes, eval_rows: int) -> None:
        """Give a domain that is being replaced other validation rows, before its first round."""
        file = f"validation/{name}-{record_of(rows).sha256[:12]}.safetensors"
        with self._changing() as manifest:
            entry = manifest.domain(name)
            assert entry.before is not None and not entry.rounds, "rounds were measured on the rows there are"
            entry.validation, entry.validation_file = self._put(file, rows), file
            entry.base_loss, entry.eval_rows = base_loss, eval_rows

    def undo_replacement(self, name: str) -> None:
        """Put a domain that is being replaced back as it was; stacks that were trained since are dropped."""
        with self._changing() as manifest:
            replacement.undo(manifest, name)

    def finish_domain(self, name: str) -> DomainEntry:
        """Close a domain after its last round; of one that was replaced, the old stacks give way to the new ones."""
        if self.manifest.domain(name).before:
            self.drop_file(f"router/prompts/{name}.safetensors")  # the new stacks may have been trained on them
        with self._changing() as manifest:
            replacement.finish(manifest, name)
        return self.manifest.domain(name)

    def join(self, other: Self, domains: dict[str, str]) -> list[StackEntry]:
        """Take over domains of another library on the same base, files byte for byte; the router is stale then.

        Args:
            domains: the name here, by the name in `other`; as `joining.joined_names` has checked them.

        Raises:
            ValueError: naming a file of `other` that is missing or damaged; then nothing has changed.
        """
        theirs, joined = other.manifest, []
        with self._changing() as manifest:
            manifest.frozen_dtype = theirs.frozen_dtype
            names: dict[str, str] = {}
            for old, new in domains.items():
                source = theirs.domain(old)
                for stack in theirs.stacks_of(old):
                    name = names[stack.name] = manifest.next_stack_name(new)
                    manifest.next_stack += 1
                    for file, record in stack.files.items():
                        other._check_way(f"stacks/{stack.name}/{file}")
                        copy_durably(other.stack_path(stack.name) / file, self.path / STAGE / name / file, record)
                    sync_folder(self.path / STAGE / name)
                    joined.append(stack.model_copy(update={"name": name, "domain": new}))
                entry = DomainEntry(
                    name=new,
                    base_loss=source.base_loss,
                    validation=source.validation,
                    eval_rows=source.eval_rows,
                    context=[names[stack] for stack in source.context],
                    rounds=[r.model_copy(update={"stack": r.stack and names[r.stack]}) for r in source.rounds],
                    done=True,
                    soft=source.soft,
                )
                if source.validation:
                    staged = self.path / STAGE / entry.validation_path
                    copy_durably(other.path / source.validation_path, staged, source.validation)
                self._append_domain(manifest, entry)
            # Were these numbers still free when the stacks are there, a kill between the two would leave what looks like
            # the newest stacks of a library whose manifest is old.
            self._commit(Manifest.read(self.path).model_copy(update={"next_stack": manifest.next_stack}))
            for stack in joined:
                self._publish(self.path / STAGE / stack.name, f"stacks/{stack.name}")
            for entry in manifest.domains:
                staged = self.path / STAGE / entry.validation_path
                if staged.exists():
                    self._publish(staged, entry.validation_path)
            manifest.stacks += joined
            if manifest.router:
                manifest.router.stale = True
        return joined

    # Reading

    def stack_path(self, name: str) -> Path:
        return self.path / "stacks" / self.manifest.stack(name).name

    def stack_config(self, name: str) -> dict[str, Any]:
        """The PEFT config of a stack. Raises ValueError when its file is missing or altered."""
        relative = f"stacks/{name}/{CONFIG}"
        content = self._content(relative, self.manifest.stack(name).files[CONFIG])
        try:
            config = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{self.path / relative} is damaged ({error}): {self.fix}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{self.path / relative} is damaged (it is no mapping): {self.fix}")
        return config

    def stack_tensors(self, name: str, verify: bool = True) -> dict[str, Tensor]:
        """The tensors of a stack, memory-mapped on the CPU. Raises ValueError naming a missing or truncated file and,
        with `verify`, which reads the whole file once, an altered one."""
        record = self.manifest.stack(name).files[WEIGHTS]
        return load_tensors(self._checked(f"stacks/{name}/{WEIGHTS}", record, verify))

    def protection(self, domain: str) -> dict[str, Tensor]:
        """The columns (out, d) that protect a domain, by projection. Raises ValueError when it has none, or its file is
        damaged or holds something else."""
        entry = self.manifest.domain(domain).protection
        if entry is None:
            raise ValueError(f"domain {domain!r} of {self.path} has no protection yet: the next training fits it")
        columns = load_tensors(self._checked(entry.file, entry.record))
        for key, tensor in columns.items():
            if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ValueError(f"{self.path / entry.file} has no columns of numbers in {printable(key)}: {self.fix}")
        return columns

    def validation(self, domain: str) -> bytes:
        """The validation rows of a domain, for `evaluation.unpack_rows`. Raises ValueError when it has none or they are
        damaged."""
        return self.validation_of(self.manifest.domain(domain))

    def validation_of(self, entry: DomainEntry) -> bytes:
        """`validation`, also of the old entry of a domain that is being replaced."""
        if entry.validation is None:
            raise ValueError(f"domain {entry.name!r} of {self.path} has no validation rows")
        return self._content(entry.validation_path, entry.validation)

    def _append_domain(self, manifest: Manifest, entry: DomainEntry) -> None:
        if entry.name in (domain.name for domain in manifest.domains):
            raise ValueError(
                f"domain {entry.name!r} is in {self.path} already: choose another name, or remove it with "
                f"`axolotl brainstacks-library {self.path} remove {entry.name}`"
            )
        manifest.domains.append(entry)

    def _put_stack(self, manifest: Manifest, domain: str, round: int, data: dict[str, bytes]) -> StackEntry:
        name = manifest.next_stack_name(domain)
        staged = self.path / STAGE / name
        files = {file: write_durably(staged / file, content) for file, content in data.items()}
        sync_folder(staged)
        self._publish(staged, f"stacks/{name}")
        entry = StackEntry(name=name, domain=domain, round=round, files=files)
        manifest.stacks.append(entry)
        manifest.next_stack += 1
        return entry


def _stack_files(domain: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """A PEFT folder's files by name. Raises ValueError for a stack that must not be kept."""
    for key, tensor in tensors.items():
        if key.endswith("brainstacks_B.weight") and not tensor.any():
            raise ValueError(
                f"dead stack: {key} of domain {domain!r} is all zero, so the stack changes nothing "
                "and is not saved: raise its learning_rate or max_steps, or lower null_space.directions"
            )
    return {CONFIG: json_to_bytes(config), WEIGHTS: tensors_to_bytes(tensors, f"the stack of domain {domain!r}")}
