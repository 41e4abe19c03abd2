"""The outer loop over domains and the inner loop over rounds (arXiv 2604.01152, residual boosting)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from axolotl_brainstacks import replacement
from axolotl_brainstacks.adapter.model import library_config, stand_for_library
from axolotl_brainstacks.curriculum.build import TRAINED, relative_library, tuner
from axolotl_brainstacks.curriculum.engine import forwards
from axolotl_brainstacks.curriculum.forgetting import Measured, forgetting_row
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.protection import check_columns
from axolotl_brainstacks.curriculum.round import Round
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.curriculum.stages import DomainStage, Stage
from axolotl_brainstacks.distributed import on_each_node, on_main, world
from axolotl_brainstacks.evaluation import Row, answer, check_vocabulary, mean_loss, pack_rows, unpack_rows
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
            if any(stage.block.null_space.directions for stage in self.plan.stages):
                on_main(lambda: check_columns(self.library, self.tuner))
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
            self.library.complete_base(base)
        else:
            self.plan.check_unchanged()
            self.library = Library.create(path, base, self.plan.block.frozen_dtype)
            stack.enter_context(self.library.writing())
        # From the first stack on, so that an interrupted curriculum can be loaded too.
        self.library.write_root_config(library_config(self.plan.raw["base_model"], ".").to_dict())

    # One domain

    def _train_domain(self, domain: DomainStage) -> None:
        entry = on_main(lambda: self._entry(domain.name))
        rounds = list(entry.rounds) if entry else []
        if self.next_stage(domain, rounds) is None:
            # A killed run ended between the last round's record and what closes the domain.
            with forwards(self.model, domain.cfg.deepspeed):
                self.finish_domain(domain)
        while (stage := self.next_stage(domain, rounds)) is not None:
            rounds.append(Round(self, domain, stage, rounds).train())

    def next_stage(self, domain: DomainStage, rounds: Sequence[RoundRecord]) -> Stage | None:
        """What the domain's next round trains on; None when its inner loop is over.

        Supervised rounds end when all are used or the last one was dropped. Then each RL round has its turn, whether or
        not the one before it was kept.
        """
        done = sum(record.rl is not None for record in rounds)
        if not rounds or (not done and rounds[-1].kept and len(rounds) < domain.block.boosting.max_rounds):
            return domain
        return domain.rl_rounds[done] if done < len(domain.rl_rounds) else None

    def finish_domain(self, stage: DomainStage) -> None:
        """Measure what the domain did to the others and close it; the last round's engine still stands."""
        self.report_forgetting(stage)
        entry = on_main(lambda: self._close(stage.name))
        kept = on_main(lambda: [stack.name for stack in self.library.manifest.stacks])
        for name in [name for name in self.stack_names() if name not in kept]:
            self.tuner.detach_stack(name)  # which another one has replaced
        if not any(record.kept for record in entry.rounds):
            LOG.warning("No round of %s lowered its validation loss, so it has no stack; check its data", stage.name)
        LOG.info("Domain %s is done: %s", stage.name, summary(entry))

    def _close(self, name: str) -> DomainEntry:
        entry = self.library.finish_domain(name)
        write_report(self.library)
        return entry

    def _entry(self, name: str) -> DomainEntry | None:
        return next((entry for entry in self.library.manifest.domains if entry.name == name), None)

    # What a round needs of the library; all of these run on every rank

    def stack_names(self) -> list[str]:
        return [stack.name for stack in self.tuner.stacks]

    def context_of(self, domain: str) -> list[str]:
        """The frozen stacks that are on while `domain` trains, one that is attached and not yet recorded among them."""
        isolated = self.plan.block.context == "isolated"

        def read() -> tuple[list[str], list[str]]:
            manifest = self.library.manifest
            return manifest.training_context(domain, isolated), [stack.name for stack in manifest.stacks]

        context, recorded = on_main(read)
        return [
            stack.name
            for stack in self.tuner.stacks
            if stack.name in context or (stack.domain == domain and stack.name not in recorded)
        ]

    def fingerprint(self, stage: Stage) -> str:
        """What a checkpoint has to have in common with this run to be resumed from: SHA-256 of the library below the
        stage, its config and its data."""

        def read() -> str:
            manifest = self.library.manifest
            parts = {
                "library": relative_library(self.plan, self.output_dir),
                "base": manifest.base.model_dump(include={"config_hash", "fingerprint", "weights"}),
                "stacks": [entry.model_dump() for entry in manifest.stacks],
                "settings": self.plan.settings_of(stage),
                "data": stage.data,
                "processes": world()[1],
            }
            return record_of(json_to_bytes(parts)).sha256

        return on_main(read)

    def start_domain(self, stage: DomainStage) -> None:
        """Measure the base and list the domain, once; everything later rounds measure on is stored with it."""
        entry = on_main(lambda: self._entry(stage.name))
        if entry is not None and (entry.rounds or entry.before is None):
            # Rows given since would make the losses of its rounds incomparable.
            rows = on_main(lambda: self._rows_of(self.library.manifest.domain(stage.name)))
            measured = len(rows) if entry.eval_rows is None else entry.eval_rows
            stage.rows, stage.spare_rows = rows[:measured], rows[measured:]
            return
        with self.tuner.using_stacks([]), self.model.disable_adapter():
            base_loss = self.loss(stage.rows)
        packed, measured = pack_rows([*stage.rows, *stage.spare_rows]), len(stage.rows)
        if entry is not None:  # to be replaced, perhaps on other data
            on_main(lambda: self.library.renew_validation(stage.name, base_loss, packed, measured))
        else:
            soft = stage.name in self.plan.block.router.soft_domains
            fresh = DomainEntry(name=stage.name, base_loss=base_loss, eval_rows=measured, soft=soft)
            on_main(lambda: self.library.add_domain(fresh, packed))
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
        rules = stage.block.samples
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
        measured, every_stack = on_main(lambda: self._when_finished(stage))
        with self.model.disable_adapter():
            row = forgetting_row(self.tuner, measured, every_stack, self.loss)

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

    def _when_finished(self, stage: DomainStage) -> tuple[list[Measured], list[str]]:
        """The domains with rows to measure on, and all stacks, as they will be once `stage` is finished."""
        manifest = self.library.manifest.model_copy(deep=True)
        replacement.finish(manifest, stage.name)
        every_stack = [stack.name for stack in manifest.active_stacks]
        finished = [entry for entry in manifest.domains if entry.done]
        if unmeasured := [entry.name for entry in finished if entry.validation is None]:
            LOG.info("Not measured, for want of validation rows: %s", ", ".join(unmeasured))
        measured = []
        for entry in finished:
            if entry.validation is not None:
                rows = self._rows_of(entry)[: entry.eval_rows]
                measured.append(Measured(entry.name, rows, [name for name in entry.context if name in every_stack]))
        return measured, every_stack

    def _rows_of(self, entry: DomainEntry) -> list[Row]:
        rows = unpack_rows(self.library.validation_of(entry), f"the validation rows of {entry.name}")
        check_vocabulary(rows, self.model, f"The validation rows of {entry.name}")
        return rows

    # The end

    def _become_a_reference(self) -> None:
        """Drop the fresh stack: what Axolotl saves into output_dir is a PEFT folder that points at the library."""
        self.tuner.use_stacks(None)
        library = relative_library(self.plan, self.output_dir)
        stand_for_library(self.model, TRAINED, self.plan.raw["base_model"], library)


def summary(entry: DomainEntry) -> str:
    """One line: the base's loss, then each round's."""
    rounds = [f"{r.rl or 'round'} {r.round} {r.loss_after:.4f}{'' if r.kept else ' (dropped)'}" for r in entry.rounds]
    return ", ".join([f"base {entry.base_loss:.4f}", *rounds])
