"""Seeds of random numbers in tests: functions of the test's id and of one environment variable.

`BRAINSTACKS_TEST_SEED=7 python -m pytest ...` draws other numbers than the default, 0; a failed test prints its variable.
"""

import hashlib
import os
import random
from random import Random

import numpy as np
import torch

VARIABLE = "BRAINSTACKS_TEST_SEED"
# Set for child processes too: a fork server, for one, keeps the environment that it was started with.
os.environ.setdefault(VARIABLE, "0")


def seed_of(name: str) -> int:
    """A seed below 2**32 that follows from `name` and the environment variable alone, whatever ran before."""
    return int.from_bytes(hashlib.sha256(f"{os.environ[VARIABLE]} {name}".encode()).digest()[:4])


def seed_everything(name: str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch with `seed_of(name)`."""
    seed = seed_of(name)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seeded_random() -> Random:
    """A generator of its own, seeded from the global one, which conftest.py seeds for every test and fixture."""
    return Random(random.getrandbits(64))
