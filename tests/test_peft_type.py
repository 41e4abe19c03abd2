"""PEFT knows the type BRAINSTACKS as one of its own, in whatever order the packages are imported."""

import copy
import json
import pickle
import subprocess
import sys

from peft import PeftType

from axolotl_brainstacks.adapter import BrainstacksConfig, StackTuner
from axolotl_brainstacks.adapter.registration import register_peft_type


def test_the_peft_type_is_a_member_like_any_other() -> None:
    member = PeftType("BRAINSTACKS")
    assert member is PeftType["BRAINSTACKS"] is PeftType.BRAINSTACKS and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps(member) == '"BRAINSTACKS"' and list(PeftType).count(member) == 1
    before = list(PeftType)
    register_peft_type(lambda: StackTuner)
    assert list(PeftType) == before
    config = BrainstacksConfig(r=3, num_experts=2, target_modules=["v_proj", "q_proj"])
    assert pickle.loads(pickle.dumps(config)) == config == BrainstacksConfig(**config.to_dict())


# Each order of imports in a process of its own, forked from one that has loaded what PEFT needs, but not PEFT.
IMPORTS = """
import os, sys

def alone(action):
    if not (child := os.fork()):
        action()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def light():
    import axolotl_brainstacks
    heavy = {"torch", "peft", "transformers", "axolotl"} & set(sys.modules)
    assert not heavy, heavy

def order(*steps):
    for step in steps:
        if step == "look":
            from transformers.utils import is_peft_available
            assert is_peft_available() and "peft" not in sys.modules
        else:
            __import__(step)
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
    from axolotl_brainstacks.adapter import BrainstacksConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BRAINSTACKS] is BrainstacksConfig

alone(light)
import bitsandbytes, torch._dynamo, transformers.models.auto.auto_factory
assert "peft" not in sys.modules
alone(lambda: order("peft", "axolotl_brainstacks"))
alone(lambda: order("axolotl_brainstacks", "look", "peft"))
alone(lambda: order("axolotl_brainstacks.adapter.layer"))
alone(lambda: order("axolotl_brainstacks.calibration"))
alone(lambda: order("axolotl_brainstacks.evaluation"))
alone(lambda: order("axolotl_brainstacks.serving.model"))
alone(lambda: order("axolotl_brainstacks.router.router"))
"""


def test_importing_the_package_teaches_peft_the_type_in_any_order_and_costs_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
