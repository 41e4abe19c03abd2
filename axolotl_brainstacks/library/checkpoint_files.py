"""Digests a checkpoint's safetensors files from two kilobytes of each tensor.

A quantised load rounds small differences between two models away; the files they were loaded from still show them.
"""

import hashlib
import json
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LOG = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Runs of bytes spread evenly over a tensor, its first and last bytes among them.
RUNS, RUN_BYTES = 4, 512
TENSOR_DIGEST_BYTES = 4


class CheckpointDigest(BaseModel):
    """What a checkpoint's files hold.

    layout: SHA-256 (hex) of all tensors' names, dtypes and shapes, however they are spread over files.
    tensors: 4 bytes (8 hex digits) for each tensor in the order of names, a hash of sampled bytes.
    commit: commit hash of the repository on the Hub, if the files are in the Hub's cache.
    """

    model_config = ConfigDict(extra="forbid")

    layout: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: Annotated[str, Field(pattern=r"^([0-9a-f]{8})*$")]
    commit: str | None = None

    def differing(self, other: "CheckpointDigest") -> tuple[int, int]:
        """Count the tensors whose sampled bytes differ.

        Returns:
            The number of tensors that differ, and the number of all tensors. (0, 0) if the two cannot be compared, because
            one was saved in another dtype, or by a program that names tensors differently.
        """
        if self.layout != other.layout:
            return 0, 0
        mine, its = (_split(digest.tensors) for digest in (self, other))
        return sum(a != b for a, b in zip(mine, its, strict=False)) + abs(len(mine) - len(its)), len(mine)


def digest_checkpoint(name: str, revision: str | None = None) -> CheckpointDigest | None:
    """Digest a model's files without downloading anything.

    Args:
        name: a local folder, or the Hub's name of a model whose files are in the Hub's cache.
        revision: the branch, tag or commit to look for in the cache.

    Returns:
        The digest. None if there are no safetensors files, if they cannot be read, or if the cache has several versions and
        `revision` does not say which one is meant.
    """
    if not name:
        return None
    try:
        candidates = [(_files(folder), commit) for folder, commit in _folders(name, revision)]
        found = [_digest(files, commit) for files, commit in candidates if files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("The checkpoint files of %s cannot be read and are not compared: %r", name, error)
        return None
    # Two commits in the cache are one model if they differ only in other files, such as the README.
    contents = {(digest.layout, digest.tensors) for digest in found}
    return found[0] if len(contents) == 1 else None


def _folders(name: str, revision: str | None) -> list[tuple[Path, str | None]]:
    """Folders that may hold the model's files, each with its commit hash if it is one of the Hub's cache."""
    if Path(name).is_dir():
        return [(Path(name), None)]
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if revision is not None:
        reference = cache / "refs" / revision
        commits = [reference.read_text().strip() if reference.is_file() else revision]
    else:
        commits = sorted(path.name for path in (cache / "snapshots").glob("*"))
    return [(cache / "snapshots" / commit, commit) for commit in commits]


def _files(folder: Path) -> list[Path]:
    """The safetensors files that Transformers would load from `folder`; empty if it has none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    return [folder / file for file in sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))]


def _digest(files: list[Path], commit: str | None) -> CheckpointDigest:
    tensors = sorted(entry for file in files for entry in _tensors(file))
    layout = hashlib.sha256(json.dumps([entry[:3] for entry in tensors]).encode()).hexdigest()
    return CheckpointDigest(layout=layout, tensors="".join(entry[3] for entry in tensors), commit=commit)


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """Name, dtype, shape and hash of each tensor of a file.

    Format: 8 bytes with the header's length, little-endian; a JSON header with dtype, shape and byte range of each
    tensor; the tensors.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            first, end = (start + offset for offset in entry["data_offsets"])
            runs = [data[at : min(at + RUN_BYTES, end)] for at in _starts(first, end)]
            digest = hashlib.blake2b(b"".join(runs), digest_size=TENSOR_DIGEST_BYTES).hexdigest()
            yield name, str(entry["dtype"]), list(entry["shape"]), digest


def _starts(first: int, end: int) -> range | list[int]:
    """Where the sampled runs of a tensor that occupies the bytes [first, end) begin; a small tensor is read whole."""
    if end - first <= RUNS * RUN_BYTES:
        return range(first, end, RUN_BYTES)
    return [first + i * (end - first - RUN_BYTES) // (RUNS - 1) for i in range(RUNS)]


def _split(tensors: str) -> list[str]:
    digits = 2 * TENSOR_DIGEST_BYTES
    return [tensors[i : i + digits] for i in range(0, len(tensors), digits)]
