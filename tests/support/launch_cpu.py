"""`torchrun --nproc_per_node=2 launch_cpu.py CONFIG`: Axolotl's train command with several processes on CPUs.

A CUDA build of torch without a GPU misleads three places about the backend; everything else is Axolotl as it is.
"""

import sys

import accelerate.state
import axolotl.cli.config
import axolotl.utils.trainer
from accelerate.utils import DistributedType
from axolotl.utils.dict import DictDefault

normalize = axolotl.cli.config.normalize_config


def normalize_for_cpu(cfg: DictDefault) -> None:
    normalize(cfg)
    cfg.device_map = {"": "cpu"}


def gloo(self: accelerate.state.PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_CPU


axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
axolotl.cli.config.normalize_config = normalize_for_cpu
accelerate.state.PartialState._prepare_backend = gloo

if __name__ == "__main__":
    config = sys.argv[1]
    sys.argv = sys.argv[:1]
    from axolotl.cli.train import do_cli

    do_cli(config)
