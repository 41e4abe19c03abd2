"""Definitions that several parts share: the names of domains and of a library's files, the dtype of frozen stacks, the pin."""

import re
from typing import Literal

# None: the compute dtype of the base model.
FrozenDtype = Literal["bfloat16"] | None
# Files of a library; the second are the two that a router answers from.
MANIFEST = "manifest.json"
ROUTER_FILES = ("router/router_config.json", "router/router.safetensors")
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
# The environment variable with the SHA-256 of the only manifest that this process may open.
PIN = "BRAINSTACKS_LIBRARY_SHA256"
