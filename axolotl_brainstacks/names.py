"""Definitions that the YAML and the files of a library share: the names of domains and the dtype of frozen stacks."""

import re
from typing import Literal

# None: the compute dtype of the base model.
FrozenDtype = Literal["bfloat16"] | None
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
