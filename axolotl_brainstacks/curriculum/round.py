"""One round: train a fresh stack on top of the frozen ones, restore its best weights, freeze the stack if it helped."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import setup_trainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.curriculum.build import ADAPTER_NAME
from axolotl_brainstacks.curriculum.checkpoints import Fingerprint, last_complete_checkpoint, step_of
from axolotl_brainstacks.curriculum.engine import describe, release
from axolotl_brainstacks.curriculum.guard import Guard, Objective, evaluation_figures
from axolotl_brainstacks.curriculum.metrics import name_metrics
from axolotl_brainstacks.curriculum.progress import Progress
from axolotl_brainstacks.curriculum.protection import Columns, keep_out_of_others, largest_leakage
from axolotl_brainstacks.curriculum.rl import between_generations, prepare_rl
from axolotl_brainstacks.curriculum.rl_checks import ONLINE
from axolotl_brainstacks.curriculum.session import Session
from axolotl_brainstacks.curriculum.stage_trainers import stage_trainers
from axolotl_brainstacks.curriculum.stages import DomainStage, Stage
from axolotl_brainstacks.curriculum.verdict import loss_so_far, unscored, unusable, why_dropped
from axolotl_brainstacks.curriculum.workers import keep_workers
from axolotl_brainstacks.distributed import on_each_node, world_size
from axolotl_brainstacks.library import RoundRecord
from axolotl_brainstacks.library.storage import full_disk_named

LOG = get_logger(__name__)


class Round(TrainerCallback):
    """One round of a domain. It trains one stack on the data of `stage`: the domain's supervised data, or an RL round's.

    It is a callback of its own trainer, because measuring losses and fitting columns before the first step needs the
    trainer's engine, which the Trainer builds only inside `train`.

    Args:
        session: what all rounds of the run share.
        domain: the domain, with its validation examples.
        stage: the data and config of this round.
        earlier: the records of the domain's rounds so far.
    """

    def __init__(self, session: Session, domain: DomainStage, stage: Stage, earlier: Sequence[RoundRecord]) -> None:
        self.session, self.domain, self.stage, self.earlier = session, domain, stage, list(earlier)
        self.number = len(earlier) + 1
        self.model, self.tuner, self.ledger = session.model, session.tuner, session.ledger
        self.loss_before = math.nan
        self.columns: Columns = {}
        self.checkpoint: Path | None = None

    @contextmanager
    def trained(self) -> Iterator[RoundRecord]:
        """Train, judge and record this round, from its start or from its last complete checkpoint; yield its record.

        The engine exists until the block ends, so that the block can measure losses. After that the engine and the round's
        checkpoints are gone.
        """
        self.session.interruption.leave_if_received(
            lambda: f"The same command continues with {self.stage.name}, round {self.number}"
        )
        cfg = self._config()
        with stage_trainers(cfg):
            self._prepare_stack(cfg.seed)
            set_seed(cfg.seed)
            guard = self._guard()
            self.progress = Progress(self._title(), guard, bool(self.ledger.plan.raw.get("debug")))
            trainer = self.trainer = self._trainer(cfg, guard)
            checkpoint = self.checkpoint = last_complete_checkpoint(Path(cfg.output_dir), guard.fingerprint)
            # The guard needs the objective before the first step. On resuming, its state file has it.
            trainer.args.eval_on_start = checkpoint is None
            if checkpoint is not None:
                LOG.info("Resuming %s, round %d, from %s", self.stage.name, self.number, checkpoint)
                guard.resume(checkpoint)
            with full_disk_named(Path(cfg.output_dir)), self.progress.shown():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if not guard.ended(trainer.state):
                self.session.interruption.leave_if_received(lambda: self._where_to_resume(cfg, guard))
            if guard.evaluated_step != trainer.state.global_step:
                trainer.evaluate()
            guard.close()
            guard.restore_best()
            yield self._judge(trainer, cfg, guard)
            # The engine is released only after the block, which measures losses with it. Checkpoints go last: until the round
            # is recorded in the library, a killed run resumes from them.
            release(trainer)
            del self.trainer, trainer
        on_each_node(lambda: _remove(Path(cfg.output_dir)))

    def _config(self) -> DictDefault:
        cfg = copy.deepcopy(self.stage.cfg)
        cfg.output_dir = str(self.session.output_dir / "stages" / f"{self.stage.name}-{self.number}")
        cfg.seed = round_seed(cfg.seed, self.stage.name, self.number)
        # The Trainer deletes old checkpoints before the guard has completed the new one. With fewer than two left, a kill in
        # between would leave no complete checkpoint.
        cfg.save_total_limit = max(cfg.save_total_limit or 2, 2)
        return cfg

    def _prepare_stack(self, seed: int) -> None:
        """Initialise the stack in training with this stage's settings, and switch the stacks of its context on."""
        config = self.model.peft_config[ADAPTER_NAME]
        assert isinstance(config, BrainstacksConfig)
        config.balance_coef = self.stage.block.balance_coef
        # Online methods need the policy that samples completions to be the one whose probabilities are trained. Gate noise
        # would make the two differ.
        config.noisy_gate = self.stage.block.noisy_gate and self.stage.rl not in ONLINE
        self.tuner.reset_stack(ADAPTER_NAME, seed)
        self.tuner.use_stacks(self.ledger.context_of(self.stage.name))

    def _guard(self) -> Guard:
        rules, rl = self.stage.block.boosting, self.stage.block.rl
        objective = Objective(worst_rise=rules.spike_threshold)
        if self.stage.rl in ONLINE:
            objective = Objective("eval_reward", -1, rl.max_reward_drop, from_start=True, reason="reward collapse")
        loss_spike = rl.loss_spike if self.stage.rl else None
        return Guard(self.tuner, ADAPTER_NAME, rules.patience, objective, loss_spike, self._fingerprint())

    def _title(self) -> str:
        """Domain, and which of at most how many rounds; such as ``math 3/3 dpo``."""
        supervised = len(self.earlier) if self.stage.rl else self.domain.block.boosting.max_rounds
        supervised -= sum(record.rl is not None for record in self.earlier)
        total = supervised + len(self.domain.rl_rounds)
        return f"{self.stage.name} {self.number}/{total}{f' {self.stage.rl}' if self.stage.rl else ''}"

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint.of(
            self.stage.settings,
            library=self.ledger.plan.library_from(self.session.output_dir),
            **self.ledger.below(),
            data=self.stage.data,
            processes=world_size(),
        )

    def _where_to_resume(self, cfg: DictDefault, guard: Guard) -> str:
        """For a user whose run was stopped. Every rank has to call this."""
        checkpoint = last_complete_checkpoint(Path(cfg.output_dir), guard.fingerprint)
        here = f"{self.stage.name}, round {self.number}"
        if checkpoint is None:
            return f"There is no complete checkpoint of {here} yet; the same command begins the round again"
        return (
            f"The checkpoint of {here}, step {step_of(checkpoint)} is in {checkpoint}; the same command resumes from it"
        )

    def _trainer(self, cfg: DictDefault, guard: Guard) -> Trainer:
        with _tensorboard_logs(self.session.output_dir / "runs" / f"{self.stage.name}-{self.number}"):
            trainer = setup_trainer(
                cfg=cfg,
                train_dataset=self.stage.train_dataset,
                eval_dataset=self.stage.eval_dataset,
                model=self.model,
                tokenizer=self.session.tokenizer,
                processor=None,
                total_num_steps=self.stage.total_steps,
            )
        keep_workers(trainer)
        PluginManager.get_instance().post_trainer_create(cfg, trainer)
        if self.stage.rl:
            prepare_rl(trainer, self.stage.rl, cfg.seed, guard.report)
        if self.stage.rl in ONLINE:
            guard.resumable = partial(between_generations, trainer)
        # Before the callbacks of Axolotl and the user: the guard has to complete a checkpoint before another one reads it.
        trainer.callback_handler.callbacks[:0] = [self, guard, self.session.interruption]
        self.progress.attach(trainer)
        name_metrics(trainer, self.tuner, self.stage.name, self.number)
        return trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        LOG.info("Domain %s, round %d: %s", self.stage.name, self.number, describe(self.trainer))
        self._check_batches(len(kwargs["train_dataloader"]), len(self.trainer.get_eval_dataloader()))
        self._start_domain()
        rules = self.stage.block.null_space
        self.columns = keep_out_of_others(self.session, self.stage.name, rules, args.per_device_eval_batch_size)
        if self.earlier:
            self.loss_before = loss_so_far(self.earlier)
        else:
            with self.model.disable_adapter():
                self.loss_before = self.session.loss(self.domain.rows)
        LOG.info("%s, round %d starts at a validation loss of %.4f", self.stage.name, self.number, self.loss_before)
        if self.checkpoint is None:
            # The Trainer keeps the checkpoints with the highest steps. Old ones of another run could displace this round's.
            on_each_node(lambda: _remove(*Path(str(args.output_dir)).glob("checkpoint-*")))

    def _start_domain(self) -> None:
        """Measure the base model's loss and list the domain in the library, before the domain's first round only.

        The validation examples are stored with it, and all later rounds are measured on these.
        """
        domain, entry = self.domain, self.ledger.entry(self.domain.name)
        if entry is not None and (entry.rounds or entry.before is None):
            # The YAML may name other validation data now, but the losses of a domain's rounds have to be comparable.
            domain.rows, domain.spare_rows = self.ledger.rows_of(domain.name)
            return
        with self.tuner.using_stacks([]), self.model.disable_adapter():
            base_loss = self.session.loss(domain.rows)
        self.ledger.start_domain(domain, base_loss)
        LOG.info("%s: validation loss of the base model %.4f", domain.name, base_loss)

    def _report_samples(self) -> None:
        """Answer the domain's first validation prompts, and store the answers for the report."""
        answers = self.session.answers(self.domain.rows, self.domain.name, self.domain.block.samples)
        if answers:
            place = {"domain": self.domain.name, "round": self.number}
            self.ledger.record_samples(self.domain.name, self.number, [place | answer for answer in answers])

    def _check_batches(self, train: int, evaluation: int) -> None:
        """Raises ValueError if a dataset is too small to give every process a batch, for example because of packing."""
        for key, batches in (("datasets", train), ("test_datasets` or `val_set_size", evaluation)):
            if not batches:
                raise ValueError(
                    f"The examples of `{key}` of domain `{self.stage.name}` do not fill one batch on each of "
                    f"{self.trainer.accelerator.num_processes} processes; give more examples, or set `sample_packing` (for "
                    "validation `eval_sample_packing`) to false"
                )

    def _judge(self, trainer: Trainer, cfg: DictDefault, guard: Guard) -> RoundRecord:
        """Freeze the stack, measure the domain's loss with it, and add it to the library if it helped.

        The loss is measured with the frozen stack, in the dtype that answers will use, not with the fp32 stack in training.
        """
        name = self.stage.name
        tensors = self.tuner.export_stack(ADAPTER_NAME)
        record = RoundRecord(
            round=self.number,
            rl=self.stage.rl,
            kept=False,
            loss_before=self.loss_before,
            loss_after=self.loss_before,
            steps=trainer.state.global_step,
            stop_reason=guard.stop_reason,
            dropped=unscored(guard) or unusable(tensors),
        )
        if self.stage.rl:
            assert guard.start is not None
            record.objective_before = guard.objective.sign * guard.start
        if record.dropped:
            return self._drop(record)
        if self.stage.rl:
            measured = trainer.evaluate()
            record.objective_after = measured[guard.objective.key]
            figures = evaluation_figures(measured)
            record.metrics = {f"{key}_before": value for key, value in guard.start_metrics.items()}
            record.metrics |= {f"{key}_after": value for key, value in figures.items()}
        record.metrics |= {
            "null_space_leakage": largest_leakage(self.columns, tensors),
            "best_eval_loss": guard.objective.sign * guard.best_loss,
        }
        frozen = self.ledger.next_stack_name(name)
        config = self.model.peft_config[ADAPTER_NAME]
        assert isinstance(config, BrainstacksConfig)
        # From here on the frozen copy stands for the round's stack; the one in training is the identity again.
        self.tuner.reset_stack(ADAPTER_NAME, cfg.seed)
        self.tuner.attach_stack(frozen, name, config, tensors)
        self.tuner.use_stacks(self.ledger.context_of(name))
        with self.model.disable_adapter():
            record.loss_after = self.session.loss(self.domain.rows)
        supervised = [record for record in self.earlier if record.rl is None]
        record.dropped = why_dropped(record, self.stage, guard.objective, loss_so_far(supervised or [record]))
        if record.dropped:
            self.tuner.detach_stack(frozen)
            return self._drop(record)
        record.kept = True
        LOG.info("%s, round %d: validation loss %.4f -> %.4f", name, self.number, self.loss_before, record.loss_after)
        if record.rl:
            LOG.info(
                "%s, round %d: held-out %s %.4f -> %.4f",
                *(name, self.number, guard.objective.key.removeprefix("eval_")),
                *(record.objective_before, record.objective_after),
            )
        self._report_samples()
        record = self.ledger.record_round(name, record, (config.to_dict() | {"inference_mode": True}, tensors))
        assert record.stack == frozen
        LOG.info("%s, round %d%s is kept: stack %s", name, self.number, f" ({record.rl})" if record.rl else "", frozen)
        return record

    def _drop(self, record: RoundRecord) -> RoundRecord:
        LOG.warning("%s, round %d is dropped: %s", self.stage.name, self.number, record.dropped)
        return self.ledger.record_round(self.stage.name, record, None)


def round_seed(seed: int, domain: str, number: int) -> int:
    """The seed of a round's initial stack, gate noise and order of examples.

    It differs between rounds, because stacks with equal initial weights would stay similar. It does not depend on the rest of
    the library, so that a domain with `context: isolated` comes out the same in any library.
    """
    digest = hashlib.sha256(f"{seed}.{domain}.{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


@contextmanager
def _tensorboard_logs(folder: Path) -> Iterator[None]:
    """Let a trainer built inside the block write TensorBoard logs to `folder`, unless the user has chosen a folder.

    The Trainer's default would be the round's `output_dir`, which is removed after the round.
    """
    key = "TENSORBOARD_LOGGING_DIR"
    if key in os.environ:
        yield
        return
    os.environ[key] = str(folder)
    try:
        yield
    finally:
        del os.environ[key]


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
