"""One round: train a fresh stack on top of what is frozen, keep its best weights, freeze it if it helped."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.trainer import setup_trainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from axolotl_brainstacks.adapter.config import BrainstacksConfig
from axolotl_brainstacks.curriculum.build import TRAINED
from axolotl_brainstacks.curriculum.engine import describe, release
from axolotl_brainstacks.curriculum.guard import Guard, last_complete_checkpoint
from axolotl_brainstacks.curriculum.metrics import name_metrics
from axolotl_brainstacks.curriculum.protection import Columns, keep_out_of_others, largest_leakage
from axolotl_brainstacks.curriculum.stages import DomainStage
from axolotl_brainstacks.distributed import on_each_node, on_main
from axolotl_brainstacks.library import RoundRecord
from axolotl_brainstacks.storage import full_disk_named

if TYPE_CHECKING:
    from axolotl_brainstacks.curriculum.runner import CurriculumRunner

LOG = get_logger(__name__)


class Round(TrainerCallback):
    """A stage (domain, round). As a callback it measures and fits once the engine stands, before the first step."""

    def __init__(self, runner: CurriculumRunner, stage: DomainStage, number: int) -> None:
        self.runner, self.stage, self.number = runner, stage, number
        self.model, self.tuner = runner.model, runner.tuner
        self.loss_before = math.nan
        self.columns: Columns = {}
        self.checkpoint: Path | None = None

    def train(self) -> RoundRecord:
        """Train, judge and record this round; also resumes it from its last complete checkpoint."""
        self.runner.interruption.leave_if_received()
        cfg = self._config()
        with self.runner.plan.stage(cfg):
            self.tuner.reset_stack(TRAINED, cfg.seed)
            self.tuner.use_stacks(self.runner.context_of(self.stage.name))
            set_seed(cfg.seed)
            guard = Guard(self.tuner, TRAINED, self.runner.plan.block.boosting, self.runner.fingerprint(self.stage))
            trainer = self.trainer = self._trainer(cfg, guard)
            checkpoint = self.checkpoint = last_complete_checkpoint(Path(cfg.output_dir), guard.fingerprint)
            if checkpoint is not None:
                LOG.info("Resuming %s, round %d, from %s", self.stage.name, self.number, checkpoint)
                guard.resume(checkpoint)
                trainer.args.eval_on_start = False  # the guard would judge one more set of weights than undisturbed
            with full_disk_named(Path(cfg.output_dir)):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if not guard.ended(trainer.state):
                self.runner.interruption.leave_if_received()
            if guard.evaluated_step != trainer.state.global_step:
                trainer.evaluate()
            guard.restore_best()
            record = self._judge(trainer, cfg, guard)
            if self.runner.is_over([record]):
                self.runner.finish_domain(self.stage)
            release(trainer)
            del self.trainer, trainer
        on_each_node(lambda: _remove(Path(cfg.output_dir)))
        return record

    def _config(self) -> DictDefault:
        cfg = copy.deepcopy(self.stage.cfg)
        cfg.output_dir = str(self.runner.output_dir / "stages" / f"{self.stage.name}-{self.number}")
        # From name and round alone: the same domain starts alike in any library, and no two stacks start alike.
        digest = hashlib.sha256(f"{cfg.seed}.{self.stage.name}.{self.number}".encode()).digest()
        cfg.seed = int.from_bytes(digest[:4], "little")
        # The Trainer removes the checkpoint before the last one while the last one is not complete yet.
        cfg.save_total_limit = max(cfg.save_total_limit, 2)
        return cfg

    def _trainer(self, cfg: DictDefault, guard: Guard) -> Trainer:
        with _tensorboard_logs(self.runner.output_dir / "runs" / f"{self.stage.name}-{self.number}"):
            trainer = setup_trainer(
                cfg=cfg,
                train_dataset=self.stage.train_dataset,
                eval_dataset=self.stage.eval_dataset,
                model=self.model,
                tokenizer=self.runner.tokenizer,
                processor=None,
                total_num_steps=self.stage.total_steps,
            )
        PluginManager.get_instance().post_trainer_create(cfg, trainer)
        trainer.callback_handler.callbacks[:0] = [self, guard, self.runner.interruption]
        name_metrics(trainer, self.tuner, self.stage.name, self.number)
        return trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        LOG.info("Stage %s, round %d: %s", self.stage.name, self.number, describe(self.trainer))
        self._check_batches(len(kwargs["train_dataloader"]), len(self.trainer.get_eval_dataloader()))
        self.runner.start_domain(self.stage)
        rules = self.runner.plan.block.settings_of(self.stage.name).null_space
        self.columns = keep_out_of_others(self.runner, self.stage.name, rules, args.per_device_eval_batch_size)
        rounds = on_main(lambda: self.runner.library.manifest.domain(self.stage.name).rounds)
        if rounds:
            self.loss_before = rounds[-1].loss_after
        else:
            with self.model.disable_adapter():
                self.loss_before = self.runner.loss(self.stage.rows)
        LOG.info("%s, round %d starts at a validation loss of %.4f", self.stage.name, self.number, self.loss_before)
        if self.checkpoint is None:
            # The Trainer keeps the checkpoints of the highest steps, whoever wrote them.
            on_each_node(lambda: _remove(*Path(str(args.output_dir)).glob("checkpoint-*")))

    def _check_batches(self, train: int, evaluation: int) -> None:
        """Raises ValueError where packing, or the number of processes, leaves no whole batch of a small dataset."""
        for key, batches in (("datasets", train), ("test_datasets` or `val_set_size", evaluation)):
            if not batches:
                raise ValueError(
                    f"The rows of `{key}` of domain `{self.stage.name}` do not fill one batch on each of "
                    f"{self.trainer.accelerator.num_processes} processes; give more rows, or set `sample_packing` (for "
                    "validation `eval_sample_packing`) to false"
                )

    def _judge(self, trainer: Trainer, cfg: DictDefault, guard: Guard) -> RoundRecord:
        """Freeze the stack and measure it as the library will hold it; keep it if the loss fell."""
        runner, name = self.runner, self.stage.name
        tensors = self.tuner.export_stack(TRAINED)
        metrics = {"null_space_leakage": largest_leakage(self.columns, tensors), "best_eval_loss": guard.best_loss}
        if cfg.rl:
            # Preference losses compare with the model before this stack, so they are the trainer's to measure: ln 2 then.
            self.loss_before, loss_after = math.log(2), trainer.evaluate()["eval_loss"]
        frozen = on_main(lambda: runner.library.manifest.next_stack_name(name))
        config = self.model.peft_config[TRAINED]
        assert isinstance(config, BrainstacksConfig)
        self.tuner.reset_stack(TRAINED, cfg.seed)
        self.tuner.attach_stack(frozen, name, config, tensors)
        self.tuner.use_stacks(runner.context_of(name))
        if not cfg.rl:
            with self.model.disable_adapter():
                loss_after = runner.loss(self.stage.rows)
        kept = loss_after < self.loss_before
        record = RoundRecord(
            round=self.number, kept=kept, loss_before=self.loss_before, loss_after=loss_after,
            steps=trainer.state.global_step, stop_reason=guard.stop_reason, metrics=metrics,
        )  # fmt: skip
        if not kept:
            LOG.warning(
                "%s, round %d: loss %.4f is no better than %.4f before it; dropped",
                name,
                self.number,
                loss_after,
                self.loss_before,
            )
            self.tuner.detach_stack(frozen)
            return runner.record(self.stage, record, None)
        LOG.info("%s, round %d: validation loss %.4f -> %.4f", name, self.number, self.loss_before, loss_after)
        runner.report_samples(self.stage, self.number)
        record = runner.record(self.stage, record, tensors)
        assert record.stack == frozen
        return record


@contextmanager
def _tensorboard_logs(folder: Path) -> Iterator[None]:
    """Outside the stage's folder, which is removed; unless the user names a place, or writes no such logs."""
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
