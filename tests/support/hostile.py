"""What the tests of strangers' libraries share: files changed by someone who also writes their hashes into the manifest."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from axolotl_brainstacks.library.entries import CONFIG, WEIGHTS
from axolotl_brainstacks.library.storage import record_of


def change_manifest(library: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = library / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def replace(library: Path, relative: str, data: bytes) -> None:
    """Write a file of a stack, the router or the root, or one of the records, and list it as it is now."""
    (library / relative).write_bytes(data)
    record = record_of(data).model_dump()

    def listed(manifest: dict[str, Any]) -> None:
        for stack in manifest["stacks"]:
            for file in stack["files"]:
                if relative == f"stacks/{stack['name']}/{file}":
                    stack["files"][file] = record
        for files in ((manifest["router"] or {}).get("files", {}), manifest["root"], manifest["records"]):
            if relative in files:
                files[relative] = record

    change_manifest(library, listed)


def change_config(library: Path, folder: str, changes: Mapping[str, Any]) -> None:
    """Change keys of an `adapter_config.json`; None takes a key out."""
    relative = f"{folder}{CONFIG}"
    config = json.loads((library / relative).read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    replace(library, relative, json.dumps(config).encode())


def change_tensors(library: Path, folder: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    relative = f"{folder}{WEIGHTS}"
    tensors = {key: tensor.clone() for key, tensor in load_file(library / relative).items()}
    change(tensors)
    replace(library, relative, save(tensors, metadata={"format": "pt"}))
