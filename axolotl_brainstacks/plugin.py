"""Axolotl's hooks. Each hands over to the part of the package that does the work."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.utils.dict import DictDefault
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, Trainer

    from axolotl_brainstacks.curriculum.footprint import Footprint
    from axolotl_brainstacks.curriculum.plan import Plan
    from axolotl_brainstacks.curriculum.preflight import TrainingRun

ADAPTER = "brainstacks"
# The releases of Axolotl whose internals this plugin was tested with: from the first, up to and without the second.
SUPPORTED = ((0, 21), (0, 22))


class BrainstacksPlugin(BasePlugin):
    """Inert unless the config says `adapter: brainstacks`.

    plan: the checked config. run: what training it takes, once the data are loaded. footprint: what the run may make
    before it is refused.
    """

    def __init__(self) -> None:
        check_axolotl(version("axolotl"))
        super().__init__()
        self.plan: Plan | None = None
        self.run: TrainingRun | None = None
        self.footprint: Footprint | None = None

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def get_input_args(self) -> str:
        return "axolotl_brainstacks.args.BrainstacksArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        self.plan = self.run = self.footprint = None
        if (installed := sys.modules.get(f"{__package__}.errors")) is not None:
            installed.uninstall()  # by an earlier config of this process
        if cfg.get("adapter") != ADAPTER and not cfg.get("brainstacks"):
            return
        from axolotl_brainstacks import errors

        if not cfg.get("debug"):
            errors.install(self._clean_up)
        if cfg.get("adapter") == ADAPTER:
            from axolotl_brainstacks.curriculum.footprint import Footprint
            from axolotl_brainstacks.curriculum.plan import Plan
            from axolotl_brainstacks.curriculum.progress import bars_for_terminals_only

            bars_for_terminals_only()
            self.plan = Plan.prepare(cfg)
            self.footprint = Footprint(self.plan)
        else:
            raise ValueError(
                f"`brainstacks:` is set but `adapter:` is {cfg.get('adapter') or 'missing'}; write `adapter: brainstacks`"
            )

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        if self.plan is None:
            return None
        from axolotl_brainstacks.curriculum.preflight import TrainingRun

        self.run = TrainingRun.prepare(self.plan, preprocess)
        if self.footprint:
            self.footprint.keep_prepared()
        return self.run.first_datasets

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        if self.plan:
            # Until here Axolotl had to see one of its own adapters, or it would not have quantised the base.
            cfg.adapter = ADAPTER

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel, PeftConfig] | None:
        if self.plan is None:
            return None
        from axolotl_brainstacks.curriculum.build import build_adapter

        return build_adapter(model, cfg, self.plan)

    def _clean_up(self) -> None:
        if self.footprint:
            self.footprint.erase()

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        return self.run.training_args(cfg) if self.run else None

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        if self.run is None:
            return None
        from axolotl_brainstacks.curriculum.conductor import conductor_class
        from axolotl_brainstacks.curriculum.stage_trainers import inside_a_stage

        return None if inside_a_stage() else conductor_class(self.run)


def check_axolotl(installed: str) -> None:
    """Raises ValueError for a release of Axolotl that the plugin was not tested with."""
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    first, end = SUPPORTED
    if not first <= release < end:
        wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, end))}"
        raise ValueError(
            f"Axolotl {installed} is installed, and axolotl_brainstacks.BrainstacksPlugin supports {wanted}: "
            f'pip install "axolotl{wanted}"'
        )
