"""What a run is going to do: the raw config, the `brainstacks:` block, and the stages made of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import init_distributed_state
from axolotl.utils.logging import get_logger

from axolotl_brainstacks.adapter.model import PROJECTIONS
from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.checks import check_refused, check_values
from axolotl_brainstacks.curriculum.overlay import EVALUATION, SAVING, check_overlay, overlaid, overlaid_rl
from axolotl_brainstacks.curriculum.rl_checks import check_rl, rl_title
from axolotl_brainstacks.distributed import check_same, is_main, on_each_node, on_main, shared_by_all
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.manifest import Manifest
from axolotl_brainstacks.library.storage import record_of

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

    from axolotl_brainstacks.curriculum.stages import DomainStage, Stage

LOG = get_logger(__name__)

_STACK_KEYS = {"num_experts", "top_k", "noisy_gate", "balance_coef", "context", "null_space", "frozen_dtype"}
_NOT_LEARNED_FROM = {
    *("axolotl_config_path", "brainstacks", "dataset_num_proc", "dataset_prepared_path", "logging_steps", "output_dir"),
    *SAVING,
    "save_total_limit",
}
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass
class Plan:
    """A validated run. `raw` is the user's config before Axolotl saw it, with our defaults filled in."""

    raw: dict[str, Any]
    block: BrainstacksBlock
    library_path: Path
    inference: bool
    makes_router: bool = False
    inside_stage: bool = False
    output_shared: bool = True
    library_seen: str = ""
    stages: list[DomainStage] = field(default_factory=list)

    @classmethod
    def prepare(cls, cfg: DictDefault) -> Plan:
        """Check what can be checked on the raw config, and turn `cfg` into one that Axolotl treats as (Q)LoRA.

        Axolotl quantises, prepares for k-bit training and enables gradient checkpointing for its own adapter names
        only.

        Raises:
            ValueError: naming the key, its value, and the mend.
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
        library_path = Path(block.library or Path(cfg["output_dir"]) / "library").expanduser()
        if Path(cfg["output_dir"]).resolve().is_relative_to(library_path.resolve()):
            raise ValueError(
                f"`output_dir` is {cfg['output_dir']}, which is the library {library_path} or inside it: name a folder "
                "outside in `output_dir`, or another one in `brainstacks.library`"
            )
        plan = cls(_plain(cfg), block, library_path, bool(cfg.get("inference")))
        if plan.inference and block.library_sha256:
            Library.open(library_path, block.library_sha256)
        plan._disguise(cfg)
        return plan

    def _disguise(self, cfg: DictDefault) -> None:
        """Axolotl's base config: its own adapter name, and the first domain's datasets to validate with."""
        cfg["adapter"] = "qlora" if cfg.get("load_in_4bit") else "lora"
        self.raw["adapter"] = cfg["adapter"]
        if self.block.domains:
            complete = overlaid(self.raw, self.block.domains[0].overlay)
            for key in set(cfg) - set(complete):
                del cfg[key]
            cfg.update(complete)

    def load_stages(self, preprocess: bool = False) -> TrainDatasetMeta:
        """Validate every stage and load its data, and print the plan; the data of the first one still to be trained.

        Args:
            preprocess: print a whole table, not only its summary.

        Raises:
            ValueError: if any domain's config or data is unusable, or nodes do not have the same library or data.
            SystemExit: with status 0 when the library holds all domains already.
        """
        from axolotl.common.datasets import TrainDatasetMeta

        from axolotl_brainstacks.curriculum.preview import print_plan
        from axolotl_brainstacks.curriculum.stages import load_domains

        init_distributed_state()
        done = self._done_domains()
        todo = [domain for domain in self.block.curriculum if domain.name not in done]
        if not todo:
            # Of a run that was killed when all was done but this.
            on_each_node(self.remove_leftovers)
            names = ", ".join(domain.name for domain in self.block.curriculum)
            print(f"Brainstacks: nothing to do, {self.library_path} holds all domains already: {names}")
            raise SystemExit(0)
        self.stages = load_domains(self.raw, todo, self.block, with_rl=True, training=not preprocess)
        for stage in self.stages:
            check_same(f"The data of domain `{stage.name}`", stage.all_data, "give all nodes the same files")
        self.output_shared = shared_by_all(Path(self.raw["output_dir"]))
        if is_main():
            print_plan(self, whole=preprocess)
        first = self.stages[0]
        return TrainDatasetMeta(first.train_dataset, first.eval_dataset, first.total_steps)

    def remove_leftovers(self) -> None:
        """Remove what rounds of these domains left in `output_dir`; another run's may be beside it."""
        stages = Path(self.raw["output_dir"]) / "stages"
        for domain in self.block.curriculum:
            for folder in stages.glob(f"{domain.name}-*"):
                shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            stages.rmdir()

    def check_same_library(self) -> None:
        """Raises ValueError on every rank unless all of them see the same library, and the one that is pinned."""
        if self.block.library_sha256:
            Library.open(self.library_path, self.block.library_sha256)
        self.library_seen = self._library_state()
        check_same(
            f"The library {self.library_path}",
            self.library_seen,
            "put it on a file system that all nodes share, or copy it from the first node to the others",
        )

    def check_unchanged(self) -> None:
        """Raises ValueError if the library is not what `check_same_library` saw. To be called under its lock."""
        if self._library_state() != self.library_seen:
            raise ValueError(
                f"The library {self.library_path} has been changed since this run read it: run the same command again"
            )

    def _library_state(self) -> str:
        if not Library.exists(self.library_path):
            return "nothing there"
        return f"manifest {record_of(Manifest.read_bytes(self.library_path)).sha256[:12]}"

    def _done_domains(self) -> set[str]:
        """The domains that the library holds already. Raises ValueError if it is damaged, being written, or not the same
        for every process."""
        on_main(self._check_library)
        self.check_same_library()
        if not Library.exists(self.library_path):
            self.block.check_names([])
            return set()
        library = Library.open(self.library_path)
        self.block.check_names(entry.name for entry in library.manifest.domains)
        library.manifest.check_frozen_dtype(self.block.frozen_dtype)
        self._check_rl_rounds(library)
        done = {entry.name for entry in library.manifest.domains if entry.done}
        if self.block.domain in done:
            raise ValueError(
                f"brainstacks.domain: `{self.block.domain}` is already in the library {self.library_path}; choose "
                f"another name, or remove it with `axolotl brainstacks-library {self.library_path} remove "
                f"{self.block.domain}`"
            )
        return done

    def _check_rl_rounds(self, library: Library) -> None:
        """Raises ValueError when the RL rounds that a half-trained domain has behind it are others than the YAML's."""
        entries = {entry.name: entry for entry in library.manifest.domains}
        for domain in self.block.curriculum:
            if domain.name not in entries:
                continue
            asked = [entry.rl for entry in domain.rl_rounds]
            behind = [record.rl for record in entries[domain.name].rounds if record.rl]
            if entries[domain.name].done:
                if asked[len(behind) :]:
                    LOG.warning(
                        "Domain %s is finished, so its `rl_rounds:` %s are not trained; to train the domain again with them: "
                        "axolotl brainstacks-library %s replace %s",
                        *(domain.name, ", ".join(asked[len(behind) :]), self.library_path, domain.name),
                    )
            elif asked[: len(behind)] != behind:
                raise ValueError(
                    f"`rl_rounds:` of domain `{domain.name}` are {', '.join(asked) or 'none'}, but {', '.join(behind)} were "
                    "trained before the run was stopped: put these first, as they were"
                )

    def _check_library(self) -> None:
        if self.block.library_sha256:
            Library.open(self.library_path, self.block.library_sha256)
        if not Library.exists(self.library_path):
            return Library.check_new(self.library_path)
        # In this order: entering removes what a killed writer left behind, which is no damage.
        try:
            with Library.open(self.library_path).writing() as library:
                problems = library.damage()
        except OSError as error:
            raise ValueError(
                f"The library {self.library_path} cannot be read and written ({error}): mend that, or name another folder "
                "in `brainstacks.library`"
            ) from error
        if problems:
            raise ValueError(
                f"The library is damaged: {problems[0]}; restore the file from a copy, or remove its domain with "
                f"`axolotl brainstacks-library {self.library_path} remove DOMAIN` and train it again"
            )

    def settings_of(self, stage: Stage) -> dict[str, Any]:
        """The keys, by the user's names, that decide what a stage learns."""
        keys = {key: value for key, value in stage.keys.items() if key not in _NOT_LEARNED_FROM}
        return keys | {"brainstacks": stage.block.model_dump(include=_STACK_KEYS)}

    def training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """What Axolotl's builders do not pass on to a stage's trainer by themselves."""
        engine = {"deepspeed": cfg.deepspeed} if cfg.rl and cfg.deepspeed else {}
        return engine | {"save_on_each_node": not self.output_shared}

    @contextmanager
    def stage(self, cfg: DictDefault) -> Iterator[None]:
        """While inside, Axolotl's builders make ordinary trainers for `cfg`, and other plugins see it."""
        manager = PluginManager.get_instance()
        before, manager.cfg, self.inside_stage = manager.cfg, cfg, True
        try:
            yield
        finally:
            manager.cfg, self.inside_stage = before, False


def _plain(value: Any) -> Any:
    """Deep copy with ordinary dicts: a DictDefault answers None for keys it does not have."""
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
        # Frozen stacks are buffers, equal on all ranks: DDP would send them around before every forward.
        "ddp_broadcast_buffers": False,
        "save_total_limit": 2,
    }.items():
        if cfg.get(key) is None and default is not None:
            cfg[key] = default
    for kernel in _KERNELS:
        if cfg.get(kernel):
            LOG.warning("`%s` is switched off: the fused LoRA kernels know nothing of stacks", kernel)
        cfg[kernel] = False
    if not any(cfg.get(key) for key in EVALUATION):
        cfg["eval_steps"] = 0.1
    if not any(cfg.get(key) for key in SAVING):
        cfg["save_steps"] = 0.2
