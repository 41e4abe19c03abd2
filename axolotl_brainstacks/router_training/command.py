"""`axolotl brainstacks-router X.yml`: makes the router of a library. The command starts this module in a launcher's processes."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import cleanup_distributed, init_distributed_state
from rich.console import Console

from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.curriculum.build import tuner
from axolotl_brainstacks.curriculum.engine import forwards
from axolotl_brainstacks.curriculum.preflight import LibraryState
from axolotl_brainstacks.distributed import check_same, is_main, on_main
from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.report import PAGE
from axolotl_brainstacks.plugin import BrainstacksPlugin
from axolotl_brainstacks.router.router import routable_domains
from axolotl_brainstacks.router_training import report
from axolotl_brainstacks.router_training.data import load_samples
from axolotl_brainstacks.router_training.measure import LossMeter
from axolotl_brainstacks.router_training.pipeline import EVALUATION, inputs_digest, made_before, make_router
from axolotl_brainstacks.router_training.split import split


def run(config: str) -> None:
    """Make the router of the library that a YAML names. Every process must call this.

    Args:
        config: path of the YAML.

    Raises:
        ValueError: if the config, the library or the data have a fault that the user must fix.
    """
    from axolotl.cli.config import load_cfg

    cfg = load_cfg(config, inference=True, rl=None)
    init_distributed_state()
    plugins = PluginManager.get_instance().plugins.values()
    plugin = next((plugin for plugin in plugins if isinstance(plugin, BrainstacksPlugin) and plugin.plan), None)
    if plugin is None or plugin.plan is None:
        raise ValueError(f"{config} does not say `adapter: brainstacks`: a router belongs to a library of stacks")
    assert plugin.footprint is not None
    with plugin.footprint.erased_if_refused():
        _make(cfg, plugin)


def _make(cfg: DictDefault, plugin: BrainstacksPlugin) -> None:
    from axolotl.cli.utils import load_model_and_tokenizer

    assert plugin.plan is not None
    plan = plugin.plan = replace(plugin.plan, makes_router=True)
    state = LibraryState.same_for_all(plan)
    library = Library.open(plan.library_path)
    domains = checked_domains(library, plan.block)
    samples = load_samples(plan, library, domains)
    split(samples, plan.block.router)  # `make_router` splits again; here an error comes before the model is loaded
    digest = inputs_digest(library, samples, plan.block.router)
    check_same("The router's prompts", digest[:12], "give all nodes the same files")
    evaluation = on_main(lambda: made_before(library, digest))
    if evaluation is not None:
        _show(library, evaluation, "nothing has changed since it was made")
        return
    model, _, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    base = None
    if library.manifest.base.weights is None:  # a library from an older version
        # Every process takes part, because sharded parameters are gathered.
        base = BaseModelInfo.of(tuner(model).model, plan.raw["base_model"], plan.raw.get("revision_of_model"))
    meter = LossMeter(
        model, tuner(model), domains, library.manifest.active_stacks, cfg.eval_batch_size or cfg.micro_batch_size
    )
    with ExitStack() as stack:
        stack.enter_context(forwards(model, cfg.deepspeed))

        def lock() -> None:
            stack.enter_context(library.writing())
            state.check_unchanged()
            if base is not None:
                library.complete_base(base)

        on_main(lock)
        evaluation = make_router(library, meter, samples, plan.block.router)
    _show(library, evaluation, "saved")


def _show(library: Library, evaluation: dict[str, Any], state: str) -> None:
    if is_main():
        report.show(evaluation, Console(markup=False, emoji=False))
        print(f"The router of {library.path}: {state}; figures in {EVALUATION} and {PAGE}")


def checked_domains(library: Library, block: BrainstacksBlock) -> list[str]:
    """The domains that the router will choose among.

    Raises:
        ValueError: if there are none, or the config names a domain that does not exist or another dtype than the library's.
    """
    domains = routable_domains(library.manifest)
    if not domains:
        raise ValueError(
            f"{library.path} has no finished domain with a stack, so there is nothing to route among: run `axolotl train`"
        )
    block.check_names(entry.name for entry in library.manifest.domains)
    library.manifest.check_frozen_dtype(block.frozen_dtype)
    return domains


def main() -> None:
    """Entry point of a process. An error that the user must fix is printed as one line, without a traceback."""
    try:
        run(sys.argv[1])
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        cleanup_distributed()


if __name__ == "__main__":
    main()
