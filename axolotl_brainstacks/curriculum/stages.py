"""Stages: the complete Axolotl config and the data of a domain's supervised rounds, or of one of its RL rounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import gpu_capabilities
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.config import merge_input_args
from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from pydantic import ValidationError

from axolotl_brainstacks.args import BrainstacksBlock, DomainArgs
from axolotl_brainstacks.config_errors import explain
from axolotl_brainstacks.curriculum.overlay import SAVING, overlaid, overlaid_rl
from axolotl_brainstacks.curriculum.reward_check import check_rewards, load_reward_funcs
from axolotl_brainstacks.curriculum.rl_checks import ONLINE, check_generations, check_rows, rl_title
from axolotl_brainstacks.distributed import world_size
from axolotl_brainstacks.evaluation import IGNORED, Example, pack_rows
from axolotl_brainstacks.library.storage import record_of

LOG = get_logger(__name__)

# Keys of the `brainstacks:` block that change what a round learns, so that a checkpoint with others is not resumed from.
_STACK_KEYS = {"num_experts", "top_k", "noisy_gate", "balance_coef", "context", "null_space", "frozen_dtype"}
# Keys that may change between a run and its resumption, because they do not change what a round learns.
_NOT_LEARNED_FROM = {
    *("axolotl_config_path", "brainstacks", "dataset_num_proc", "dataset_prepared_path", "debug", "logging_steps"),
    "output_dir",
    *SAVING,
    "save_total_limit",
}


@dataclass
class Stage:
    """What a round trains on: the data and config of a domain's supervised rounds, or of one of its RL rounds.

    name: the domain's name.
    keys: the raw config from which Axolotl made `cfg`.
    block: the `brainstacks:` settings that hold for it.
    total_steps: the steps of one round; None if Axolotl has not computed them.
    """

    name: str
    keys: dict[str, Any]
    block: BrainstacksBlock
    cfg: DictDefault
    train_dataset: Dataset
    eval_dataset: Dataset
    total_steps: int | None

    @property
    def rl(self) -> str | None:
        """The kind of preference or reinforcement learning; None for supervised rounds."""
        return None if self.cfg.rl is None else str(getattr(self.cfg.rl, "value", self.cfg.rl))

    @property
    def settings(self) -> dict[str, Any]:
        """The keys, by the user's names, that decide what the stage learns."""
        keys = {key: value for key, value in self.keys.items() if key not in _NOT_LEARNED_FROM}
        return keys | {"brainstacks": self.block.model_dump(include=_STACK_KEYS)}

    @cached_property
    def data(self) -> str:
        """A one-line description of the data, with hashes; it is equal for equal data."""
        return f"{_described(self.train_dataset)}, validation {_described(self.eval_dataset)}"


@dataclass
class DomainStage(Stage):
    """One domain, ready to train. It is the stage of its supervised rounds itself; `rl_rounds` are those that follow.

    rows: the validation examples that all losses of the domain are measured on.
    spare_rows: further validation examples, kept in the library to fit the columns that protect the domain.
    """

    rows: list[Example]
    spare_rows: list[Example]
    rl_rounds: list[Stage] = field(default_factory=list)

    @cached_property
    def data(self) -> str:
        validation = record_of(pack_rows([*self.rows, *self.spare_rows])).sha256[:12]
        return f"{_described(self.train_dataset)}, validation {validation}"

    @property
    def all_data(self) -> str:
        """The `data` of the domain and of all its RL rounds."""
        return ", ".join([self.data, *(stage.data for stage in self.rl_rounds)])


def _described(dataset: Dataset) -> str:
    return f"{len(dataset)} rows {rows_hash(dataset)[:12]}"


def stage_config(raw: dict[str, Any], domain: DomainArgs) -> DictDefault:
    """The complete, validated config of a domain's supervised rounds. Raises as `validated` does."""
    return validated(_keys(raw, domain), f"domain `{domain.name}`")


def _keys(raw: dict[str, Any], domain: DomainArgs) -> dict[str, Any]:
    return overlaid({key: value for key, value in raw.items() if key != "brainstacks"}, domain.overlay)


def validated(keys: dict[str, Any], where: str) -> DictDefault:
    """The complete, validated config of one stage.

    Args:
        keys: the raw config, without the `brainstacks:` block.
        where: the stage's name in errors.

    Raises:
        ValueError: naming the keys whose values Axolotl refuses.
    """
    capabilities, env_capabilities = gpu_capabilities()
    try:
        cfg = validate_config(DictDefault(keys), capabilities=capabilities, env_capabilities=env_capabilities)
    except ValidationError as error:
        mistakes = explain(error, "", merge_input_args()[1])
        raise ValueError(f"The config of {where} is not valid: {mistakes}") from None
    # Axolotl's own command does the same after validation; a stage's config does not pass through that command.
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg


@dataclass(frozen=True)
class _Configured:
    """A stage before its data is loaded; `where` is its name in errors."""

    where: str
    keys: dict[str, Any]
    block: BrainstacksBlock
    cfg: DictDefault


def load_domains(
    raw: dict[str, Any],
    domains: list[DomainArgs],
    block: BrainstacksBlock,
    with_rl: bool = False,
    training: bool = False,
) -> list[DomainStage]:
    """Validate the configs of all domains, then load all of their data, so that every mistake shows before training.

    Args:
        raw: the raw config.
        domains: the domains to load.
        block: the whole `brainstacks:` block.
        with_rl: load their RL rounds too.
        training: also check what depends on the number of processes.

    Raises:
        ValueError: naming the domain or RL round whose config or data is unusable.
    """
    configured = [(domain, _configured(raw, domain, block, with_rl, training)) for domain in domains]
    return [_load(domain.name, *parts) for domain, parts in configured]


def _configured(
    raw: dict[str, Any], domain: DomainArgs, block: BrainstacksBlock, with_rl: bool, training: bool
) -> tuple[_Configured, list[_Configured]]:
    own = _keys(raw, domain)
    where, settings = f"domain `{domain.name}`", domain.brainstacks.over(block)
    rl_rounds = []
    for number, entry in enumerate(domain.rl_rounds if with_rl else ()):
        keys, title = overlaid_rl(own, entry.overlay), rl_title(domain.name, number)
        cfg = validated(keys, title)
        if cfg.val_set_size and cfg.val_set_size >= 1:
            cfg.val_set_size = int(cfg.val_set_size)  # Axolotl converts a count only for supervised data
        if training and entry.rl in ONLINE:
            check_generations(cfg, world_size(), title)
        rl_rounds.append(_Configured(title, keys, entry.brainstacks.over(settings), cfg))
    return _Configured(where, own, settings, validated(own, where)), rl_rounds


def _load(name: str, supervised: _Configured, rl_rounds: list[_Configured]) -> DomainStage:
    # The library keeps enough examples for measuring losses and for fitting the columns that protect the domain.
    stage = _loaded(name, supervised)
    measured = stage.block.eval_rows
    rows = answer_rows(stage.eval_dataset, max(measured, stage.block.null_space.samples))
    if not any(label != IGNORED for row in rows for label in row.labels[1:]):
        raise ValueError(f"No validation example of domain `{name}` has an answer token to predict; check its `type:`")
    parts = {entry.name: getattr(stage, entry.name) for entry in fields(Stage)}
    return DomainStage(
        **parts,
        rows=rows[:measured],
        spare_rows=rows[measured:],
        rl_rounds=[_loaded(name, part) for part in rl_rounds],
    )


def _loaded(name: str, configured: _Configured) -> Stage:
    where, cfg = configured.where, configured.cfg
    LOG.info("Loading the data of %s", where)
    load = load_preference_datasets if cfg.rl else load_datasets
    try:
        meta = load(cfg=cfg, cli_args=TrainerCliArgs())
    except Exception as error:
        paths = ", ".join(str(dataset.path) for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])])
        raise ValueError(
            f"The datasets of {where} ({paths}) cannot be loaded: {error!r}; check that each is there and has "
            "examples of its `type:`"
        ) from error
    if not meta.train_dataset or not len(meta.train_dataset):
        raise ValueError(f"The datasets of {where} have no usable example; check `datasets:` and `sequence_len`")
    if not meta.eval_dataset or not len(meta.eval_dataset):
        raise ValueError(
            f"No validation example is left in {where}, and without validation no round can be judged; raise "
            f"`val_set_size` (now {cfg.val_set_size}) or name `test_datasets:`"
        )
    stage = Stage(
        name, configured.keys, configured.block, cfg, meta.train_dataset, meta.eval_dataset, meta.total_num_steps
    )
    if stage.rl:
        for dataset in (stage.train_dataset, stage.eval_dataset):
            check_rows(dataset, stage.rl, where)
    if stage.rl in ONLINE:
        check_rewards(load_reward_funcs(cfg.trl.reward_funcs, where), stage.train_dataset, where)
    return stage


def rows_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of what a trainer learns from: tokens and labels, or all columns if the examples are still text."""
    tokens = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    digest = hashlib.sha256()
    for rows in dataset.select_columns(tokens or sorted(dataset.column_names)).iter(batch_size=1000):
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def answer_rows(dataset: Dataset, limit: int) -> list[Example]:
    """The first `limit` examples that have an answer token to predict."""
    rows = []
    for example in dataset:
        row = Example(list(example["input_ids"]), list(example["labels"]))
        if any(label != IGNORED for label in row.labels[1:]):
            rows.append(row)
        if len(rows) == limit:
            break
    return rows
