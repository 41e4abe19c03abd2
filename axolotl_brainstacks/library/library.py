"""The library on disk: adds, replaces, joins and removes domains and their frozen stacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from axolotl_brainstacks.guarded import load_tensors, parse_json, printable
from axolotl_brainstacks.library import replacement
from axolotl_brainstacks.library.entries import DomainEntry, NullSpaceEntry, RoundRecord, RouterEntry, StackEntry
from axolotl_brainstacks.library.folder import CONFIG, STAGING, WEIGHTS
from axolotl_brainstacks.library.manifest import BaseModelInfo as BaseModelInfo
from axolotl_brainstacks.library.manifest import Manifest
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
    """The content of a library. Every method that changes it asserts that it runs inside `writing()`."""

    def add_domain(self, entry: DomainEntry, validation: bytes | None = None) -> None:
        """List a domain.

        Args:
            entry: the domain; `entry.validation` is filled in here.
            validation: the packed examples (`evaluation.pack_rows`) that its losses are measured on.

        Raises:
            ValueError: if the library has a domain of this name.
        """
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            if validation is not None:
                entry.validation = self._put(f"validation/{entry.name}.safetensors", validation)

    def import_domain(self, entry: DomainEntry, config: dict[str, Any], tensors: dict[str, Tensor]) -> StackEntry:
        """List a domain together with its only stack, which was trained elsewhere; this makes the router stale.

        Arguments and errors are those of `add_stack`.
        """
        data = _stack_files(entry.name, config, tensors)
        with self._changing() as manifest:
            self._append_domain(manifest, entry)
            stack = self._put_stack(manifest, entry.name, 1, data)
            entry.context = [stack.name]
            if manifest.router:
                manifest.router.stale = True
        return stack

    def update_domain(self, name: str, **changes: Any) -> DomainEntry:
        """Set fields of a domain's entry, and return the new entry."""
        assert "name" not in changes, "stacks carry their domain's name"
        with self._changing() as manifest:
            entry = DomainEntry.model_validate(manifest.domain(name).model_dump() | changes)
            manifest.domains[manifest.domains.index(manifest.domain(name))] = entry
        return entry

    def record_round(self, domain: str, record: RoundRecord) -> None:
        """Record a round whose stack was not kept."""
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
        """Add a frozen stack as the PEFT folder `stacks/<name>`, last in the manifest, together with its round's record.

        Args:
            config: the PEFT config; sets become sorted lists.
            tensors: the adapter's state dict, on any device.
            record: the kept round; the stack's name is filled in here.
            context: names of the stacks that were on while this one trained; its own name is added here.

        Raises:
            ValueError: for a tensor that is not finite, or a B that is all zero.
            OSError: if the disk is full. After either error the library is unchanged.
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
        """Store the columns that protect `domain`, in place of older ones. Raises as `add_stack`.

        Args:
            tensors: orthonormal columns (out, d), fp32, by module name.
            energy, capacity_left, beyond: as in `NullSpaceEntry`.
        """
        data = tensors_to_bytes(tensors, f"the null space of domain {domain!r}")
        # The name contains the content's hash, so the file that the manifest lists now is never overwritten.
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
        """Drop the columns that protect `domain`, and those of other domains that were fitted orthogonal to them."""
        with self._changing() as manifest:
            manifest.unprotect(domain)

    def set_router(self, entry: RouterEntry | None) -> None:
        """List a fitted router whose files `write_file` has written; None lists no router."""
        with self._changing() as manifest:
            manifest.router = entry

    def set_frozen_dtype(self, dtype: FrozenDtype) -> None:
        """Set the dtype of frozen stacks in memory; the library must not have a stack yet."""
        if self.manifest.frozen_dtype != dtype:
            assert not self.manifest.stacks
            with self._changing() as manifest:
                manifest.frozen_dtype = dtype

    def complete_base(self, base: BaseModelInfo) -> None:
        """Add what an earlier version left out of the base model's record; `base` has passed `manifest.base.check`."""
        if self.manifest.base.weights is None:
            with self._changing() as manifest:
                manifest.base = manifest.base.completed(base)

    def write_root_config(self, config: dict[str, Any]) -> None:
        """Make the library itself a folder that `PeftModel.from_pretrained(base, library)` accepts."""
        data = {WEIGHTS: tensors_to_bytes({}, "the library"), CONFIG: json_to_bytes(config)}
        records = {file: record_of(content) for file, content in data.items()}
        if self.manifest.root == records and not self._problems(records):
            return
        # Listed by no manifest, half of the new files beside half of the old ones are no damage after a kill.
        with self._changing() as manifest:
            manifest.root = {}
        with self._changing() as manifest:
            manifest.root = {file: self._put(file, content) for file, content in data.items()}

    def remove_domain(self, name: str) -> list[str]:
        """Remove a domain with its stacks and the columns that protect it; this makes the router stale.

        Returns:
            The domains that were trained with its stacks on, and whose losses change now.
        """
        self.manifest.domain(name)
        # A later domain of this name may train on these prompts, so they can no longer count as held out.
        self.drop_file(f"router/prompts/{name}.safetensors")
        with self._changing() as manifest:
            dependents = manifest.dependents(name)
            manifest.unprotect(name)
            manifest.domains.remove(manifest.domain(name))
            manifest.stacks = [s for s in manifest.stacks if s.domain != name]
            if manifest.router:
                manifest.router.stale = True
        return dependents

    def replace_domain(self, name: str) -> list[str]:
        """Mark a finished domain to be trained again; its old stacks answer until the new ones are complete.

        Returns:
            The domains that were trained with its stacks on, and whose losses will change.
        """
        with self._changing() as manifest:
            dependents = manifest.dependents(name)
            replacement.begin(manifest, name)
        return dependents

    def renew_validation(self, name: str, base_loss: float, rows: bytes, eval_rows: int) -> None:
        """Give a domain that is being replaced other validation examples, before its first round.

        Args:
            base_loss: loss of the base model on the new examples, in nats per answer token.
            rows: the packed examples (`evaluation.pack_rows`).
            eval_rows: how many of them, from the first, losses are measured on.
        """
        file = f"validation/{name}-{record_of(rows).sha256[:12]}.safetensors"
        with self._changing() as manifest:
            entry = manifest.domain(name)
            assert entry.before is not None and not entry.rounds, "rounds were measured on the present examples"
            entry.validation, entry.validation_file = self._put(file, rows), file
            entry.base_loss, entry.eval_rows = base_loss, eval_rows

    def undo_replacement(self, name: str) -> None:
        """Restore a domain that is being replaced, and drop the stacks that were trained since."""
        with self._changing() as manifest:
            replacement.undo(manifest, name)

    def finish_domain(self, name: str) -> DomainEntry:
        """Mark a domain as finished after its last round; if it is being replaced, its new stacks replace the old ones."""
        if self.manifest.domain(name).before:
            # The new stacks may have been trained on these prompts, so they can no longer count as held out.
            self.drop_file(f"router/prompts/{name}.safetensors")
        with self._changing() as manifest:
            replacement.finish(manifest, name)
        return self.manifest.domain(name)

    def join(self, other: Self, domains: dict[str, str]) -> list[StackEntry]:
        """Copy domains of another library on the same base model, byte for byte; this makes the router stale.

        Args:
            domains: the name here by the name in `other`, as `joining.joined_names` returns them.

        Returns:
            The new stacks, in order.

        Raises:
            ValueError: naming a file of `other` that is missing or damaged; the library is unchanged then.
        """
        joined: list[StackEntry] = []
        with self._changing() as manifest:
            manifest.frozen_dtype = other.manifest.frozen_dtype
            names: dict[str, str] = {}
            for old, new in domains.items():
                for stack in other.manifest.stacks_of(old):
                    names[stack.name] = manifest.next_stack_name(new)
                    manifest.next_stack += 1
                    joined.append(self._stage_stack(other, stack, names[stack.name], new))
                self._append_domain(manifest, self._stage_entry(other, other.manifest.domain(old), new, names))
            # The numbers of the new stacks are committed before their folders are published. A kill in between would else
            # leave several stacks with numbers that the manifest has not given, which `_tidy` takes for an old manifest.
            self._commit(Manifest.read(self.path).model_copy(update={"next_stack": manifest.next_stack}))
            for stack in joined:
                self._publish(self.path / STAGING / stack.name, f"stacks/{stack.name}")
            for entry in manifest.domains:
                staged = self.path / STAGING / entry.validation_path
                if staged.exists():
                    self._publish(staged, entry.validation_path)
            manifest.stacks += joined
            if manifest.router:
                manifest.router.stale = True
        return joined

    def _stage_stack(self, other: Self, stack: StackEntry, name: str, domain: str) -> StackEntry:
        """Copy a stack of `other` into the staging folder, and return its entry in this library."""
        for file, record in stack.files.items():
            other._check_way(f"stacks/{stack.name}/{file}")
            copy_durably(other.stack_path(stack.name) / file, self.path / STAGING / name / file, record)
        sync_folder(self.path / STAGING / name)
        return stack.model_copy(update={"name": name, "domain": domain})

    def _stage_entry(self, other: Self, source: DomainEntry, name: str, stacks: Mapping[str, str]) -> DomainEntry:
        """Copy the validation examples of a domain of `other` into the staging folder, and return its entry in this library.

        Args:
            stacks: the names of stacks here, by their names in `other`.
        """
        rounds = [r.model_copy(update={"stack": stacks[r.stack] if r.stack else r.stack}) for r in source.rounds]
        entry = DomainEntry(
            name=name,
            base_loss=source.base_loss,
            validation=source.validation,
            eval_rows=source.eval_rows,
            context=[stacks[stack] for stack in source.context],
            rounds=rounds,
            done=True,
            soft=source.soft,
        )
        if source.validation:
            staged = self.path / STAGING / entry.validation_path
            copy_durably(other.path / source.validation_path, staged, source.validation)
        return entry

    # Reading

    def stack_path(self, name: str) -> Path:
        return self.path / "stacks" / self.manifest.stack(name).name

    def stack_config(self, name: str) -> dict[str, Any]:
        """The PEFT config of a stack. Raises ValueError if its file is missing or altered."""
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
        """The tensors of a stack by key, memory-mapped on the CPU.

        Args:
            verify: read the whole file once to compare its SHA-256.

        Raises:
            ValueError: naming the file if it is missing or truncated, or, with `verify`, altered.
        """
        record = self.manifest.stack(name).files[WEIGHTS]
        return load_tensors(self._checked(f"stacks/{name}/{WEIGHTS}", record, verify))

    def protection(self, domain: str) -> dict[str, Tensor]:
        """The orthonormal columns (out, d) that protect a domain, by module name.

        Raises:
            ValueError: if the domain has none yet, or their file is damaged or holds something else.
        """
        entry = self.manifest.domain(domain).protection
        if entry is None:
            raise ValueError(f"domain {domain!r} of {self.path} has no protection yet: the next training fits it")
        columns = load_tensors(self._checked(entry.file, entry.record))
        for key, tensor in columns.items():
            if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ValueError(f"{self.path / entry.file} has no columns of numbers in {printable(key)}: {self.fix}")
        return columns

    def validation(self, domain: str) -> bytes:
        """The packed validation examples of a domain, for `evaluation.unpack_rows`.

        Raises:
            ValueError: if the domain has none, or their file is damaged.
        """
        return self.validation_of(self.manifest.domain(domain))

    def validation_of(self, entry: DomainEntry) -> bytes:
        """As `validation`, for an entry that the manifest does not list by name: `before` of a domain being replaced."""
        if entry.validation is None:
            raise ValueError(f"domain {entry.name!r} of {self.path} has no validation examples")
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
        staged = self.path / STAGING / name
        files = {file: write_durably(staged / file, content) for file, content in data.items()}
        sync_folder(staged)
        self._publish(staged, f"stacks/{name}")
        entry = StackEntry(name=name, domain=domain, round=round, files=files)
        manifest.stacks.append(entry)
        manifest.next_stack += 1
        return entry


def _stack_files(domain: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The files of a stack's PEFT folder, by name. Raises ValueError for a stack that is all zero or not finite."""
    for key, tensor in tensors.items():
        if key.endswith("brainstacks_B.weight") and not tensor.any():
            raise ValueError(
                f"dead stack: {key} of domain {domain!r} is all zero, so the stack changes nothing "
                "and is not saved: raise its learning_rate or max_steps, or lower null_space.directions"
            )
    return {CONFIG: json_to_bytes(config), WEIGHTS: tensors_to_bytes(tensors, f"the stack of domain {domain!r}")}
