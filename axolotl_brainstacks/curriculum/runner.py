"""The outer loop over domains and the inner loop over rounds (paper section 1)."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from axolotl_brainstacks.adapter.model import library_config, stand_for_library
from axolotl_brainstacks.calibration import merge_columns
from axolotl_brainstacks.curriculum.build import TRAINED, relative_library, tuner
from axolotl_brainstacks.curriculum.engine import forwards
from axolotl_brainstacks.curriculum.forgetting import Measured, forgetting_row
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.round import Round
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.curriculum.stages import DomainStage
from axolotl_brainstacks.distributed import on_each_node, on_main, world
from axolotl_brainstacks.evaluation import Row, answer, mean_loss, pack_rows, unpack_rows
from axolotl_brainstacks.library import BaseModelInfo, DomainEntry, Library, RoundRecord
from axolotl_brainstacks.report import FORGETTING, SAMPLES, read_records, write_report
from axolotl_brainstacks.storage import json_to_bytes, record_of

LOG = get_logger(__name__)


class CurriculumRunner:
    """Trains the stages of a plan into its library. Only the main process touches the library's files."""

    def __init__(self, plan: Plan, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.plan, self.model, self.tokenizer = plan, model, tokenizer
        self.tuner = tuner(model)
        self.output_dir = Path(plan.raw["output_dir"])
        self.interruption = Interruption()
        self.library: Library

    def run(self) -> None:
        base = BaseModelInfo.of(self.tuner.model, self.plan.raw["base_model"], self.plan.raw.get("revision_of_model"))
        with ExitStack() as stack:
            stack.enter_context(self.interruption.watching())
            on_main(lambda: self._open(base, stack))
            for number, stage in enumerate(self.plan.stages, start=1):
                LOG.info("Domain %s (%d of %d)", stage.name, number, len(self.plan.stages))
                self._train_domain(stage)
            on_each_node(self.plan.remove_leftovers)
        self._become_a_reference()

    def _open(self, base: BaseModelInfo, stack: ExitStack) -> None:
        path = self.plan.library_path
        if Library.exists(path):
            self.library = Library.open(path)
            stack.enter_context(self.library.writing())
            self.plan.check_unchanged()
            self.library.set_frozen_dtype(self.plan.block.frozen_dtype)
        else:
            self.plan.check_unchanged()
            self.library = Library.create(path, base, self.plan.block.frozen_dtype)
            stack.enter_context(self.library.writing())
        # From the first stack on, so that an interrupted curriculum can be loaded too.
        self.library.write_root_config(library_config(self.plan.raw["base_model"], ".").to_dict())

    # One domain

    def _train_domain(self, stage: DomainStage) -> None:
        entry = on_main(lambda: self._entry(stage.name))
        rounds = list(entry.rounds) if entry else []
        if self.is_over(rounds):
            # Its last run ended between the last round's record and what closes the domain.
            with forwards(self.model, stage.cfg.deepspeed):
                self.finish_domain(stage)
        while not self.is_over(rounds):
            rounds.append(Round(self, stage, len(rounds) + 1).train())

    def is_over(self, rounds: list[RoundRecord]) -> bool:
        """Whether a domain's inner loop has ended: all rounds used, or the last one gained too little."""
        rules = self.plan.block.boosting
        if not rounds:
            return False
        last = rounds[-1]
        gained_enough = last.kept and last.loss_before - last.loss_after >= rules.min_loss_delta
        return last.round >= rules.max_rounds or not gained_enough

    def finish_domain(self, stage: DomainStage) -> None:
        """Measure what the domain did to the others and close it; the last round's engine still stands."""
        self.report_forgetting(stage)
        entry = on_main(lambda: self._close(stage.name))
        if not any(record.kept for record in entry.rounds):
            LOG.warning("No round of %s lowered its validation loss, so it has no stack; check its data", stage.name)
        LOG.info("Domain %s is done: %s", stage.name, summary(entry))

    def _close(self, name: str) -> DomainEntry:
        entry = self.library.update_domain(name, done=True)
        write_report(self.library)
        return entry

    def _entry(self, name: str) -> DomainEntry | None:
        return next((entry for entry in self.library.manifest.domains if entry.name == name), None)

    # What a round needs of the library; all of these run on every rank

    def stack_names(self) -> list[str]:
        return [stack.name for stack in self.tuner.stacks]

    def context_of(self, domain: str) -> list[str]:
        """The frozen stacks that are on while `domain` trains."""
        isolated = self.plan.block.context == "isolated"
        return [stack.name for stack in self.tuner.stacks if not isolated or stack.domain == domain]

    def earlier_domains(self, domain: str) -> list[Measured]:
        """The finished domains before `domain`: their validation rows, and the stacks they were trained with."""

        def read() -> list[Measured]:
            attached = self.stack_names()
            finished = [entry for entry in self.library.manifest.domains if entry.done and entry.name != domain]
            if unmeasured := [entry.name for entry in finished if entry.validation is None]:
                LOG.info("Not measured, for want of validation rows: %s", ", ".join(unmeasured))
            return [
                Measured(
                    entry.name,
                    unpack_rows(self.library.validation(entry.name)),
                    [stack for stack in entry.context if stack in attached],
                )
                for entry in finished
                if entry.validation is not None
            ]

        return on_main(read)

    def fingerprint(self, stage: DomainStage) -> str:
        """What a checkpoint has to have in common with this run to be resumed from: SHA-256 of the library below the
        stage, its config and its data."""

        def read() -> str:
            manifest = self.library.manifest
            parts = {
                "library": relative_library(self.plan, self.output_dir),
                "base": manifest.base.model_dump(include={"config_hash", "fingerprint"}),
                "stacks": [entry.model_dump() for entry in manifest.stacks],
                "settings": self.plan.settings_of(stage.name),
                "data": stage.data,
                "processes": world()[1],
            }
            return record_of(json_to_bytes(parts)).sha256

        return on_main(read)

    def null_space_columns(self) -> dict[str, Any]:
        """The union of all columns that the library holds."""

        def read() -> dict[str, Any]:
            fitted = [entry.name for entry in self.library.manifest.domains if entry.nullspace]
            return merge_columns([self.library.nullspace(name) for name in fitted])

        return on_main(read)

    def start_domain(self, stage: DomainStage) -> None:
        """Measure the base and list the domain, once; everything later rounds measure on is stored with it."""
        if on_main(lambda: self._entry(stage.name)) is not None:
            # Rows given since would make the losses of its rounds incomparable.
            stage.rows = on_main(lambda: unpack_rows(self.library.validation(stage.name)))
            return
        with self.tuner.using_stacks([]), self.model.disable_adapter():
            base_loss = self.loss(stage.rows)
        entry = DomainEntry(
            name=stage.name, base_loss=base_loss, context=[], rounds=[], nullspace=None, done=False,
            soft=stage.name in self.plan.block.router.soft_domains,
        )  # fmt: skip
        on_main(lambda: self.library.add_domain(entry, pack_rows(stage.rows)))
        LOG.info("%s: validation loss of the base model %.4f", stage.name, base_loss)

    def loss(self, rows: list[Row]) -> float:
        """Mean loss per answer token with the frozen stacks that are on."""
        raw = self.plan.raw  # not a stage's config, so that the same rows are padded alike in every stage
        return mean_loss(self.model, rows, int(raw.get("eval_batch_size") or raw["micro_batch_size"]))

    def record(self, stage: DomainStage, record: RoundRecord, tensors: dict[str, Any] | None) -> RoundRecord:
        """Write a round into the library; a kept one with its stack. Returns the record as stored."""

        context = self.context_of(stage.name)[:-1]

        def write() -> RoundRecord:
            if tensors is None:
                self.library.record_round(stage.name, record)
            else:
                config = self.model.peft_config[TRAINED].to_dict() | {"inference_mode": True}
                self.library.add_stack(stage.name, record.round, config, tensors, record, context)
            return self.library.manifest.domain(stage.name).rounds[-1]

        return on_main(write)

    def report_samples(self, stage: DomainStage, round_number: int) -> None:
        """Append answers to the domain's first validation prompts."""
        rules = self.plan.block.samples
        rows = [row for row in stage.rows if row.prompt_ids][: rules.prompts]
        if not rows:
            return
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        with self.tuner.using_stacks(self.context_of(stage.name)), self.model.disable_adapter():
            answers = answer(self.model, rows, pad, rules.max_new_tokens)
        decode = self.tokenizer.decode
        lines = [
            {
                "domain": stage.name,
                "round": round_number,
                "prompt": decode(row.prompt_ids),
                "answer": decode(tokens, skip_special_tokens=True),
                "reference": decode(row.input_ids[len(row.prompt_ids) :], skip_special_tokens=True),
            }
            for row, tokens in zip(rows, answers, strict=True)
        ]

        def write() -> None:
            old = read_records(self.library, SAMPLES)
            kept = [line for line in old if (line["domain"], line["round"]) != (stage.name, round_number)]
            self.library.write_file(SAMPLES, "".join(json.dumps(line) + "\n" for line in [*kept, *lines]).encode())

        on_main(write)

    def report_forgetting(self, stage: DomainStage) -> None:
        """Measure every domain so far, with all stacks on and with the stacks it was trained with."""
        own = on_main(lambda: self.library.manifest.domain(stage.name).context)
        measured = [*self.earlier_domains(stage.name), Measured(stage.name, stage.rows, own)]
        with self.model.disable_adapter():
            row = forgetting_row(self.tuner, measured, self.stack_names(), self.loss)

        def write() -> None:
            rows = [r for r in read_records(self.library, FORGETTING) if r["after"] != stage.name]
            self.library.write_file(FORGETTING, json.dumps([*rows, {"after": stage.name, **row}], indent=2).encode())

        on_main(write)
        for name, loss in row["own_stacks"].items():
            LOG.info(
                "After %s: %s loss %.4f with its own stacks, %.4f with all",
                stage.name,
                name,
                loss,
                row["all_stacks"][name],
            )

    # The end

    def _become_a_reference(self) -> None:
        """Drop the fresh stack: what Axolotl saves into output_dir is a PEFT folder that points at the library."""
        self.tuner.use_stacks(None)
        library = relative_library(self.plan, self.output_dir)
        stand_for_library(self.model, TRAINED, self.plan.raw["base_model"], library)


def summary(entry: DomainEntry) -> str:
    """One line: the base's loss, then each round's."""
    rounds = [f"round {r.round} {r.loss_after:.4f}{'' if r.kept else ' (dropped)'}" for r in entry.rounds]
    return ", ".join([f"base {entry.base_loss:.4f}", *rounds])
