"""Checks of a PEFT folder that holds one stack or stands for a library: its two files must agree.

The checks run before PEFT allocates a tensor or copies a weight, because PEFT trusts the sizes and names in the files.
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
# The files of a library that answering needs, as patterns for a download.
NEEDED = (
    *(MANIFEST, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    *(f"stacks/*/{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)),
    *("router/router_config.json", "router/router.safetensors"),
)


class FolderConfig(Protocol):
    """The keys of `BrainstacksConfig` that tell the kind of its folder and the sizes of the tensors in it."""

    library: str | None
    target_modules: list[str] | str | None
    task_type: Any
    r: int
    num_experts: int

    @property
    def rows(self) -> int:
        """Number of rows of a projection's A matrix."""
        ...


def check_kind(config: FolderConfig, folder: Path) -> None:
    """Check that `config` is either the config of a stack or that of a library.

    The config of a stack names target modules. The config of a library names none, and if it lies in a library's folder, its
    `library` is that folder.

    Args:
        config: as read from `folder`.
        folder: where the config lies.

    Raises:
        ValueError: if the config is neither, since PEFT would then load the base model alone, a stack that no route chooses,
            or another library; or if the weights next to it are damaged.
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
    # PEFT reads these weights next. Those in a library's folder are checked with their hash when it is attached.
    if not is_library and (weights := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        load_tensors(weights)


def check_rank(config: FolderConfig, folder: Path) -> None:
    """Check that the config's rank and number of experts are those of the tensors in `folder`.

    PEFT allocates a stack of the size that the config gives, which a damaged or altered file can make arbitrarily large.

    Raises:
        ValueError: if the two differ.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        return
    a_matrices = [tensor for key, tensor in load_tensors(weights).items() if "brainstacks_A" in key]
    found = {tensor.shape[0] if tensor.dim() else 0 for tensor in a_matrices}
    if found - {config.rows}:
        raise ValueError(
            f"{weights} holds A matrices of {min(found - {config.rows})} rows, but r {config.r} and num_experts "
            f"{config.num_experts} in its {CONFIG_NAME} make {config.rows}: restore both files from a copy"
        )


def fetch_library(config: FolderConfig, repository: str, subfolder: str, options: Mapping[str, Any]) -> str:
    """Download the files that answering needs of a library on the Hub.

    Args:
        config: a config of the repository, which names the library.
        repository: name on the Hub.
        subfolder: where in the repository the config lies; `config.library` is relative to it.
        options: of `hf_hub_download`, such as `revision`, `token` and `cache_dir`.

    Returns:
        The absolute path of the library's local copy.

    Raises:
        ValueError: if the library lies outside of the repository, or as `check_kind` raises it.
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
