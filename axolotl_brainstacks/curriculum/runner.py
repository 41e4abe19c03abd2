"""The outer loop over domains and the inner loop over rounds (arXiv 2604.01152, residual boosting)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from axolotl.utils.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from axolotl_brainstacks.curriculum.build import ADAPTER_NAME, stand_for_library, tuner
from axolotl_brainstacks.curriculum.engine import forwards
from axolotl_brainstacks.curriculum.forgetting import forgetting_row
from axolotl_brainstacks.curriculum.ledger import Ledger
from axolotl_brainstacks.curriculum.preflight import TrainingRun, remove_leftovers
from axolotl_brainstacks.curriculum.protection import check_columns
from axolotl_brainstacks.curriculum.round import Round
from axolotl_brainstacks.curriculum.session import Session
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.curriculum.stages import DomainStage, Stage
from axolotl_brainstacks.distributed import on_each_node, on_main
from axolotl_brainstacks.library import DomainEntry, RoundRecord

LOG = get_logger(__name__)


def train_curriculum(run: TrainingRun, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train the domains of `run` into its library. Afterwards `model.save_pretrained` writes a reference to the library.

    Raises:
        SystemExit: after SIGTERM or SIGINT; the same command resumes.
        ValueError: for mistakes that only the loaded model reveals.
    """
    plan, interruption = run.plan, Interruption()
    output_dir = Path(plan.raw["output_dir"])
    with interruption.watching(), Ledger.opened(plan, tuner(model), run.library) as ledger:
        batch_size = int(plan.raw.get("eval_batch_size") or plan.raw["micro_batch_size"])
        session = Session(model, tuner(model), tokenizer, ledger, interruption, output_dir, batch_size)
        if any(stage.block.null_space.directions for stage in run.stages):
            on_main(lambda: check_columns(ledger.library, session.tuner))
        for number, domain in enumerate(run.stages, start=1):
            LOG.info("Domain %s (%d of %d)", domain.name, number, len(run.stages))
            train_domain(session, domain)
        on_each_node(lambda: remove_leftovers(plan))
    # Axolotl saves the model into output_dir at the end. This makes it a PEFT folder that refers to the library, without the
    # stack in training.
    session.tuner.use_stacks(None)
    stand_for_library(model, ADAPTER_NAME, plan.raw["base_model"], plan.library_from(output_dir))


def train_domain(session: Session, domain: DomainStage) -> None:
    """Train the rounds of a domain that are not in the library yet, and mark the domain as finished."""
    entry = session.ledger.entry(domain.name)
    rounds = list(entry.rounds) if entry else []
    if next_stage(domain, rounds) is None:
        # An earlier run was killed after it recorded the last round and before it finished the domain.
        with forwards(session.model, domain.cfg.deepspeed):
            finish_domain(session, domain)
    while (stage := next_stage(domain, rounds)) is not None:
        with Round(session, domain, stage, rounds).trained() as record:
            rounds.append(record)
            if next_stage(domain, rounds) is None:
                finish_domain(session, domain)


def next_stage(domain: DomainStage, rounds: Sequence[RoundRecord]) -> Stage | None:
    """The data and config of the domain's next round; None if no round is left.

    Supervised rounds end after `boosting.max_rounds`, or with the first that was dropped. The RL rounds follow in order, each
    of them whether or not the one before it was kept.
    """
    done = sum(record.rl is not None for record in rounds)
    if not rounds or (not done and rounds[-1].kept and len(rounds) < domain.block.boosting.max_rounds):
        return domain
    return domain.rl_rounds[done] if done < len(domain.rl_rounds) else None


def finish_domain(session: Session, domain: DomainStage) -> None:
    """Measure the forgetting matrix's row of a domain and mark the domain as finished.

    The forward passes need an engine under ZeRO-3, so the last round's must not have been released yet.
    """
    report_forgetting(session, domain.name)
    entry = session.ledger.finish_domain(domain.name)
    kept = session.ledger.stack_names()
    for stack in session.tuner.stacks:
        if stack.name not in kept:  # the domain was trained again, and this is one of its old stacks
            session.tuner.detach_stack(stack.name)
    if not any(record.kept for record in entry.rounds):
        LOG.warning("No round of %s lowered its validation loss, so it has no stack; check its data", domain.name)
    LOG.info("Domain %s is done: %s", domain.name, summary(entry))


def report_forgetting(session: Session, domain: str) -> None:
    """Measure every finished domain with the stacks that it was trained with, and with all stacks on."""
    measured, every_stack, unmeasured = session.ledger.when_finished(domain)
    if unmeasured:
        LOG.info("Not measured, because they have no validation examples: %s", ", ".join(unmeasured))
    with session.model.disable_adapter():
        row = forgetting_row(session.tuner, measured, every_stack, session.loss)
    session.ledger.record_forgetting(domain, row)
    for name, loss in row["own_stacks"].items():
        all_stacks = row["all_stacks"][name]
        LOG.info("After %s: %s loss %.4f with its own stacks, %.4f with all", domain, name, loss, all_stacks)


def summary(entry: DomainEntry) -> str:
    """The losses of the base model and after each round, in one line."""
    rounds = [f"{r.rl or 'round'} {r.round} {r.loss_after:.4f}{'' if r.kept else ' (dropped)'}" for r in entry.rounds]
    return ", ".join([f"base {entry.base_loss:.4f}", *rounds])
