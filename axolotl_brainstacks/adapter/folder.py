"""A PEFT folder of ours: whether it is one stack or stands for a library, and that its two files say the same.

All is checked before PEFT makes or copies anything by what the folder says.
"""

from __future__ import annotations

import glob
import inspect
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from peft.utils.constants import CONFIG_NAME, DUMMY_TARGET_MODULES, SAFETENSORS_WEIGHTS_NAME

from axolotl_brainstacks.guarded import load_tensors

MANIFEST = "manifest.json"
# The files of a library that answers need.
NEEDED = (
    *(MANIFEST, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    *(f"stacks/*/{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)),
    *("router/router_config.json", "router/router.safetensors"),
)


class FolderConfig(Protocol):
    """The keys of `BrainstacksConfig` that say what kind of folder it lies in, and how large its tensors are."""

    library: str | None
    target_modules: list[str] | str | None
    task_type: Any
    r: int
    num_experts: int

    @property
    def rows(self) -> int: ...


def check_kind(config: FolderConfig, folder: Path) -> None:
    """A stack's config has targets. One that stands for a library has none, and names its own folder if that is a library.

    Raises:
        ValueError: otherwise: the model would be the base alone, have a stack that no route chooses, or another library; also
            when the weights beside it, which PEFT reads next, are damaged.
    """
    file, is_library = folder / CONFIG_NAME, (folder / MANIFEST).is_file()
    fix = "restore the file from a copy, or run `axolotl train` on its YAML again, which writes it anew"
    if config.library is None:
        if is_library or config.target_modules == DUMMY_TARGET_MODULES:
            raise ValueError(f"{file} stands for a library, but has no key `library`: {fix}")
        return
    if config.target_modules != DUMMY_TARGET_MODULES:
        raise ValueError(
            f"{file} names a library, so `target_modules` must be {DUMMY_TARGET_MODULES!r}, but is "
            f"{config.target_modules!r}, a stack that no route chooses: {fix}"
        )
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"{file} names a library, so `task_type` must be 'CAUSAL_LM', but is {config.task_type!r}: {fix}"
        )
    if is_library and config.library != ".":
        raise ValueError(f"{file} lies in a library, so `library` must be '.', but is {config.library!r}: {fix}")
    # A library's own are checked when it is attached, their hash first.
    if not is_library and (weights := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        load_tensors(weights)


def check_rank(config: FolderConfig, folder: Path) -> None:
    """PEFT makes a stack of the size that the config says; the tensors beside it say how large it may be.

    Raises:
        ValueError: if the two differ.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        return
    sides = [tensor for key, tensor in load_tensors(weights).items() if "brainstacks_A" in key]
    found = {tensor.shape[0] if tensor.dim() else 0 for tensor in sides}
    if found - {config.rows}:
        raise ValueError(
            f"{weights} holds A matrices of {min(found - {config.rows})} rows, but r {config.r} and num_experts "
            f"{config.num_experts} in its {CONFIG_NAME} make {config.rows}: restore both files from a copy"
        )


def fetch_library(config: FolderConfig, repository: str, subfolder: str, options: Mapping[str, Any]) -> str:
    """Fetch what answers need of the library that `config`, in `subfolder` of a Hub repository, names.

    Args:
        options: of `hf_hub_download`, such as revision, token and cache_dir.

    Returns:
        its folder here.

    Raises:
        ValueError: if the library lies outside of the repository, or as `check_kind`.
    """
    from huggingface_hub import snapshot_download

    assert config.library is not None
    inside = posixpath.normpath(posixpath.join(subfolder, config.library))
    if inside.startswith(("..", "/")):
        raise ValueError(
            f"{repository}: `library` in its {CONFIG_NAME} is {config.library!r}, outside of the repository: load the "
            "library's own folder"
        )
    known = inspect.signature(snapshot_download).parameters
    wanted = [posixpath.normpath(posixpath.join(glob.escape(inside), file)) for file in NEEDED]
    root = snapshot_download(
        repository,
        allow_patterns=[*wanted, posixpath.join(glob.escape(subfolder), MANIFEST)],
        **{key: value for key, value in options.items() if key in known},
    )
    check_kind(config, Path(root, subfolder))
    return str(Path(root, inside).resolve())
