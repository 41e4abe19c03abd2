"""Definitions that several parts share: the names of domains, the dtype of frozen stacks, and the pin of a library."""

import re
from typing import Literal

# None: the compute dtype of the base model.
FrozenDtype = Literal["bfloat16"] | None
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
# The environment variable with the SHA-256 of the only manifest that this process may open.
PIN = "BRAINSTACKS_LIBRARY_SHA256"
