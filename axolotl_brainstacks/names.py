"""What the YAML and the files of a library have in common: how a domain is named, and the type that stacks are kept as."""

import re
from typing import Literal

# None: the base model's type.
FrozenDtype = Literal["bfloat16"] | None
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
