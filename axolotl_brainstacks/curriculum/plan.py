"""Validates the raw config and the `brainstacks:` block before anything is loaded, and makes the plan of a run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

from axolotl_brainstacks.adapter.injection import PROJECTIONS
from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.checks import check_places, check_refused, check_values
from axolotl_brainstacks.curriculum.overlay import EVALUATION, SAVING, check_overlay, overlaid, overlaid_rl
from axolotl_brainstacks.curriculum.rl_checks import check_rl, rl_title
from axolotl_brainstacks.library import Library

LOG = get_logger(__name__)

_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class Plan:
    """A validated config.

    raw: the user's YAML before Axolotl changed it, with our defaults filled in.
    block: the `brainstacks:` block.
    inference: whether the run answers instead of training.
    makes_router: whether it answers in order to fit a router.
    """

    raw: dict[str, Any]
    block: BrainstacksBlock
    library_path: Path
    inference: bool
    makes_router: bool = False

    @classmethod
    def prepare(cls, cfg: DictDefault) -> Plan:
        """Check the raw config, and change `cfg` in place into one that Axolotl treats as (Q)LoRA.

        Axolotl quantises a model, prepares it for k-bit training and enables gradient checkpointing only if `adapter` is
        one of its own names, so `adapter: brainstacks` becomes `qlora` or `lora`.

        Raises:
            ValueError: naming the key, its value, and the remedy.
        """
        check_refused(cfg)
        if cfg.get("rl"):
            raise ValueError(
                "`rl` cannot be used at the top level: put it into `rl_rounds:` of the domain that it refines, under "
                "`brainstacks.domains`"
            )
        if not cfg.get("brainstacks"):
            raise ValueError("`adapter: brainstacks` needs a `brainstacks:` block with `domains:` or `domain:`")
        block = BrainstacksBlock.parse(_plain(cfg["brainstacks"]))
        _fill_defaults(cfg)
        for domain in block.curriculum:
            check_overlay(domain)
            own = overlaid(_plain(cfg), domain.overlay)
            check_values(own, f"domain `{domain.name}`", domain.overlay)
            for number, entry in enumerate(domain.rl_rounds):
                title = rl_title(domain.name, number)
                keys = overlaid_rl(own, entry.overlay)
                check_rl(keys, title)
                check_values(keys, title, entry.overlay)
            if not domain.overlay.get("datasets") and not cfg.get("datasets"):
                where = f"domain `{domain.name}` of brainstacks.domains" if block.domains else "the top level"
                raise ValueError(f"`datasets:` is missing in {where}; without data there is nothing to learn")
        check_places(cfg)
        library_path = Path(block.library or Path(cfg["output_dir"]) / "library").expanduser()
        if Path(cfg["output_dir"]).resolve().is_relative_to(library_path.resolve()):
            raise ValueError(
                f"`output_dir` is {cfg['output_dir']}, which is the library {library_path} or inside it: name a folder "
                "outside in `output_dir`, or another one in `brainstacks.library`"
            )
        if cfg.get("inference") and block.library_sha256:
            Library.open(library_path, block.library_sha256)
        cfg["adapter"] = "qlora" if cfg.get("load_in_4bit") else "lora"
        raw = _plain(cfg)
        if block.domains:  # Axolotl validates with the first domain's datasets
            complete = overlaid(raw, block.domains[0].overlay)
            for key in set(cfg) - set(complete):
                del cfg[key]
            cfg.update(complete)
        return cls(raw, block, library_path, bool(cfg.get("inference")))

    def library_from(self, folder: Path) -> str:
        """The library's path relative to `folder`, so that an `adapter_config.json` there stays right if both are moved."""
        return str(self.library_path.resolve().relative_to(folder.resolve(), walk_up=True))


def _plain(value: Any) -> Any:
    """A deep copy with ordinary dicts, because a DictDefault returns None for a missing key instead of raising KeyError."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return copy.deepcopy(value)


def _fill_defaults(cfg: DictDefault) -> None:
    for key, default in {
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_target_modules": None if cfg.get("lora_target_linear") else list(PROJECTIONS),
        "output_dir": "./model-out",
        "seed": 42,
        # Frozen stacks are buffers and equal on all ranks. By default DDP would broadcast them before every forward.
        "ddp_broadcast_buffers": False,
        "save_total_limit": 2,
    }.items():
        if cfg.get(key) is None and default is not None:
            cfg[key] = default
    for kernel in _KERNELS:
        if cfg.get(kernel):
            LOG.warning("`%s` is switched off: Axolotl's fused LoRA kernels cannot compute stacks", kernel)
        cfg[kernel] = False
    if not any(cfg.get(key) for key in EVALUATION):
        cfg["eval_steps"] = 0.1
    if not any(cfg.get(key) for key in SAVING):
        cfg["save_steps"] = 0.2
