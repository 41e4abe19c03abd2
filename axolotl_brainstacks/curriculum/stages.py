"""From the base config and a domain's overlay to a complete Axolotl config and its data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import gpu_capabilities
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.config import merge_input_args
from axolotl.loaders import load_tokenizer
from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset
from pydantic import ValidationError

from axolotl_brainstacks.args import BrainstacksBlock, DomainArgs, explain
from axolotl_brainstacks.curriculum.overlay import overlaid
from axolotl_brainstacks.evaluation import IGNORED, Row, pack_rows
from axolotl_brainstacks.storage import record_of

LOG = get_logger(__name__)


@dataclass
class DomainStage:
    """One domain, ready to train: its config, datasets, and the rows its losses are measured on."""

    name: str
    cfg: DictDefault
    train_dataset: Dataset
    eval_dataset: Dataset
    total_steps: int | None
    rows: list[Row]

    @cached_property
    def data(self) -> str:
        """The data in one line, the same for the same data."""
        training = f"{len(self.train_dataset)} rows {rows_hash(self.train_dataset)[:12]}"
        return f"{training}, validation {record_of(pack_rows(self.rows)).sha256[:12]}"


def stage_config(raw: dict[str, Any], domain: DomainArgs) -> DictDefault:
    """The complete, validated config of one domain.

    Raises:
        ValueError: naming the keys whose values Axolotl refuses.
    """
    merged = overlaid({key: value for key, value in raw.items() if key != "brainstacks"}, domain.overlay)
    capabilities, env_capabilities = gpu_capabilities()
    try:
        cfg = validate_config(DictDefault(merged), capabilities=capabilities, env_capabilities=env_capabilities)
    except ValidationError as error:
        mistakes = explain(error, "", merge_input_args()[1])
        raise ValueError(f"The config of domain `{domain.name}` is not valid: {mistakes}") from None
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg


def load_domains(raw: dict[str, Any], domains: list[DomainArgs], block: BrainstacksBlock) -> list[DomainStage]:
    """Configs first, then data, of all domains: the last one's mistakes show before the first one trains."""
    configs = [stage_config(raw, domain) for domain in domains]
    return [_load(domain.name, cfg, block) for domain, cfg in zip(domains, configs, strict=True)]


def _load(name: str, cfg: DictDefault, block: BrainstacksBlock) -> DomainStage:
    LOG.info("Loading the data of domain %s", name)
    load = load_preference_datasets if cfg.rl else load_datasets
    try:
        meta = load(cfg=cfg, cli_args=TrainerCliArgs())
    except Exception as error:
        paths = ", ".join(str(dataset.path) for dataset in [*(cfg.datasets or []), *(cfg.test_datasets or [])])
        raise ValueError(
            f"The datasets of domain `{name}` ({paths}) cannot be loaded: {error!r}; check that each is there and has rows "
            "of its `type:`"
        ) from error
    if not meta.train_dataset or not len(meta.train_dataset):
        raise ValueError(f"The datasets of domain `{name}` have no usable row; check `datasets:` and `sequence_len`")
    if not meta.eval_dataset or not len(meta.eval_dataset):
        raise ValueError(
            f"Domain `{name}` has no validation row, and without a validation loss no round can be judged; raise "
            f"`val_set_size` (now {cfg.val_set_size}) or name `test_datasets:`"
        )
    rows = answer_rows(meta.eval_dataset, cfg, block.eval_rows)
    if not any(label != IGNORED for row in rows for label in row.labels[1:]):
        raise ValueError(f"No validation row of domain `{name}` has an answer token to predict; check its `type:`")
    return DomainStage(name, cfg, meta.train_dataset, meta.eval_dataset, meta.total_num_steps, rows)


def rows_hash(dataset: Dataset) -> str:
    """SHA-256 over what a trainer learns from: tokens and labels, or the texts of preference pairs."""
    learned = [name for name in ("input_ids", "labels", "prompt", "chosen", "rejected") if name in dataset.column_names]
    digest = hashlib.sha256()
    for rows in dataset.select_columns(learned).iter(batch_size=1000):
        digest.update(json.dumps(rows, sort_keys=True).encode())
    return digest.hexdigest()


def answer_rows(dataset: Dataset, cfg: DictDefault, limit: int) -> list[Row]:
    """The first rows with an answer. Of preference pairs, the chosen answer counts."""
    if "input_ids" in dataset.column_names:
        candidates = (Row(list(row["input_ids"]), list(row["labels"])) for row in dataset)
    else:
        tokenizer = load_tokenizer(cfg)
        candidates = (_chosen(row, tokenizer, cfg.sequence_len) for row in dataset)
    rows = []
    for row in candidates:
        if any(label != IGNORED for label in row.labels[1:]):
            rows.append(row)
        if len(rows) == limit:
            break
    return rows


def _chosen(row: dict[str, Any], tokenizer: Any, limit: int) -> Row:
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    chosen = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
    return Row((prompt + chosen)[:limit], ([IGNORED] * len(prompt) + chosen)[:limit])
