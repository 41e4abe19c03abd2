"""Checks of a PEFT folder that holds one stack or stands for a library: its two files must agree.

The checks run before PEFT allocates a tensor or copies a weight, because PEFT trusts the sizes and names in the files.
"""

from __future__ import annotations

import glob
import inspect
import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from peft.utils.constants import (
    CONFIG_NAME,
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)

from axolotl_brainstacks.adapter.tensors import module_of
from axolotl_brainstacks.guarded import load_tensors, printable
from axolotl_brainstacks.names import MANIFEST, PIN, ROUTER_FILES

# The files of a library that answering needs, as patterns for a download.
NEEDED = (
    *(MANIFEST, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    *(f"stacks/*/{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)),
    *ROUTER_FILES,
)
# A name that means the same as a regular expression, as PEFT matches it: a dot stands for itself among others.
_PLAIN_NAME = re.compile(r"[\w.-]+")


class FolderConfig(Protocol):
    """The keys of `BrainstacksConfig` that tell the kind of its folder, and the names and sizes of the tensors in it."""

    library: str | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
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
            or another library; or if the weights next to it are damaged, a pickle, or no regular file.
    """
    weights = find_weights(folder)
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
    if not is_library and weights is not None:
        load_tensors(weights)


def find_weights(folder: Path) -> Path | None:
    """The file of weights that PEFT reads from `folder`; None if there is none.

    Raises:
        ValueError: if it is no regular file, which could block PEFT for ever, or a pickle.
    """
    weights, pickle = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if os.path.lexists(weights):
        if not weights.is_file():
            raise ValueError(f"{printable(weights)} is no regular file: remove it, or restore the file from a copy")
        return weights
    if os.path.lexists(pickle):
        raise ValueError(
            f"{printable(pickle)} is a pickle, which Brainstacks never reads: get the adapter as {SAFETENSORS_WEIGHTS_NAME}, "
            "the format that PEFT saves by default"
        )
    return None


def check_stack(config: FolderConfig, folder: Path) -> None:
    """Check a stack's folder that is loaded alone, and make its config name the modules that it wraps.

    PEFT allocates a stack of the size that the config gives, which a damaged or altered file can make arbitrarily large. It
    matches the config's strings as regular expressions, and a stranger's expression can take for ever. The tensors tell
    which modules they matched when the stack was saved, so their names take the place of such strings.

    Args:
        config: its fields that choose modules are changed if one of them is a regular expression.
        folder: where it lies, with the weights.

    Raises:
        ValueError: if a library is pinned; if rank and number of experts are not those of the tensors; or if the config has a
            regular expression and no weights, or one in `modules_to_save`.
    """
    if os.environ.get(PIN):
        raise ValueError(
            f"{PIN} is set, but {printable(folder)} is the folder of a stack, which no manifest of a library vouches for: load "
            f"the library that was pinned, or unset {PIN}"
        )
    for name in config.modules_to_save or ():
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"`modules_to_save` in {printable(folder / CONFIG_NAME)} is {config.modules_to_save!r}, which is no list of "
                "names: name the modules there"
            )
    weights = find_weights(folder)
    tensors = {} if weights is None else load_tensors(weights)
    a_matrices = [tensor for key, tensor in tensors.items() if "brainstacks_A" in key]
    found = {tensor.shape[0] if tensor.dim() else 0 for tensor in a_matrices}
    if found - {config.rows}:
        raise ValueError(
            f"{weights} holds A matrices of {min(found - {config.rows})} rows, but r {config.r} and num_experts "
            f"{config.num_experts} in its {CONFIG_NAME} make {config.rows}: restore both files from a copy"
        )
    if key := _pattern_key(config):
        if weights is None:
            raise ValueError(
                f"`{key}` in {printable(folder / CONFIG_NAME)} is a regular expression, which is not matched without the "
                f"{SAFETENSORS_WEIGHTS_NAME} that tells what it matched: list names of modules, or make the config in Python"
            )
        config.target_modules = sorted({module for name in tensors if (module := module_of(name))})
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _pattern_key(config: FolderConfig) -> str | None:
    """The first key of the config that PEFT would match as a regular expression."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return "target_modules"
    if isinstance(config.exclude_modules, str):
        return "exclude_modules"
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    return None if all(map(_PLAIN_NAME.fullmatch, layers)) else "layers_pattern"


def fetch_stack(repository: str, subfolder: str, options: Mapping[str, Any]) -> Path:
    """Download the files of a stack on the Hub; arguments as `fetch_library`'s. Returns the folder of its local copy."""
    wanted = [
        posixpath.join(glob.escape(subfolder), file) for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ]
    return Path(_download(repository, wanted, options), subfolder)


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
    assert config.library is not None
    inside = posixpath.normpath(posixpath.join(subfolder, config.library))
    if inside.startswith(("..", "/")):
        raise ValueError(
            f"{repository}: `library` in its {CONFIG_NAME} is {config.library!r}, outside of the repository: load the "
            "library's own folder"
        )
    wanted = [posixpath.normpath(posixpath.join(glob.escape(inside), file)) for file in NEEDED]
    beside = [
        posixpath.join(glob.escape(subfolder), file) for file in (MANIFEST, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ]
    root = _download(repository, [*wanted, *beside], options)
    check_kind(config, Path(root, subfolder))
    return str(Path(root, inside).resolve())


def _download(repository: str, patterns: list[str], options: Mapping[str, Any]) -> str:
    """Download the files of a repository on the Hub that match one of `patterns`. Returns the path of the local copy."""
    from huggingface_hub import snapshot_download

    known = inspect.signature(snapshot_download).parameters
    chosen = {key: value for key, value in options.items() if key in known}
    return snapshot_download(repository, allow_patterns=patterns, **chosen)
