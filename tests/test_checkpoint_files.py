"""The digest of a checkpoint's files: found in folders and in the Hub's cache, and different for any fine-tune."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.base_models import load, merged

from axolotl_brainstacks.library.base_model import BaseModelInfo
from axolotl_brainstacks.library.checkpoint_files import CheckpointDigest, digest_checkpoint

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


def digest(folder: Path) -> CheckpointDigest:
    found = digest_checkpoint(str(folder))
    assert found is not None
    return found


def in_cache(folder: Path, cache: Path, commit: str = COMMIT) -> Path:
    """Put a model's folder into a cache as the Hub's client does, as the repository org/tiny."""
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, repository / "snapshots" / commit)


def change_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_small_fine_tune_behind_nf4_is_seen_in_the_files(smollm2_dir: Path, tmp_path: Path) -> None:
    merged(load(smollm2_dir, "fp32"), 1e-5).save_pretrained(tmp_path)
    base, other = (
        BaseModelInfo.of(load(folder, "double nf4 of bf16"), folder.name) for folder in (smollm2_dir, tmp_path)
    )
    with pytest.raises(
        ValueError, match=rf"{smollm2_dir.name}.*{tmp_path.name}.*210 of 27. tensors in the checkpoint's"
    ):
        base.check(other)
    base.check(other.model_copy(update={"checkpoint": None}))  # nothing else shows it
    assert len(base.weights or "") + len(base.checkpoint.model_dump_json() if base.checkpoint else "") < 120_000


def test_one_changed_tensor_is_counted(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "changed")
    before = digest(folder)
    assert before == digest(tiny_llama_dir)
    change_one_tensor(folder)
    assert before.differing(digest(folder)) == (1, 21)


def test_shards_make_no_difference_and_another_dtype_is_not_compared(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_llama_dir, "fp32")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert digest(tmp_path / "shards") == digest(tiny_llama_dir)
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert digest(tmp_path / "half").differing(digest(tiny_llama_dir)) == (0, 0)
    # The weights in memory decide then.
    base = BaseModelInfo.of(load(tiny_llama_dir, "fp32"), "tiny")
    base.check(BaseModelInfo.of(load(tmp_path / "half", "bf16"), "half"))
    merged(load(tiny_llama_dir, "fp32"), 1e-3).bfloat16().save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"weight differs"):
        base.check(BaseModelInfo.of(load(tmp_path / "merged", "bf16"), "merged"))


def test_files_in_the_hub_s_cache(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert digest_checkpoint("org/tiny") is None
    in_cache(tiny_llama_dir, tmp_path)
    expected = digest(tiny_llama_dir).model_copy(update={"commit": COMMIT})
    for revision in (None, "main", COMMIT):
        assert digest_checkpoint("org/tiny", revision) == expected
    assert digest_checkpoint("org/tiny", OTHER_COMMIT) is None

    newer = in_cache(tiny_llama_dir, tmp_path, OTHER_COMMIT)  # its README has changed
    found = digest_checkpoint("org/tiny")
    assert found is not None and found.tensors == expected.tensors
    change_one_tensor(newer)
    assert digest_checkpoint("org/tiny") is None, "which of the two was loaded is not known"
    assert digest_checkpoint("org/tiny", COMMIT) == expected
    assert digest_checkpoint("org/tiny", "main") != expected


def test_without_readable_safetensors_there_is_no_digest(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert digest_checkpoint("") is None and digest_checkpoint("no/such") is None
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    file = folder / "model.safetensors"
    for damage in (b"", b"\xff" * 64, file.read_bytes()[:100]):
        file.write_bytes(damage)
        assert digest_checkpoint(str(folder)) is None
    file.unlink()
    assert digest_checkpoint(str(folder)) is None
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "missing.safetensors"}}))
    assert digest_checkpoint(str(folder)) is None


def test_any_run_of_a_large_tensor_is_read_at_its_ends(tmp_path: Path) -> None:
    tensor = torch.zeros(100_000)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    before = digest(tmp_path)
    for position in (0, -1, 33_300):
        changed = tensor.clone()
        changed[position] = 1
        save_file({"w": changed}, tmp_path / "model.safetensors")
        assert before.differing(digest(tmp_path)) == (1, 1)
