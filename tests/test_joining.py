"""Domains of another library are taken over: bit for bit, all or none, and only where they are what they were."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.curricula import curriculum_config
from support.processes import finish, start_train, train
from support.random_library import CONFIG, a_round, alter_a_byte, new_library, some_tensors, truncate, weights

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry
from axolotl_brainstacks.library.joining import joined_names
from axolotl_brainstacks.library.manifest import BaseModelInfo


def finished(path: Path, *domains: str, base: BaseModelInfo | None = None) -> Library:
    library = new_library(path, *domains, base=base)
    with library.writing():
        for name in domains:
            library.finish_domain(name)
    return library


@pytest.fixture
def library(tmp_path: Path) -> Library:
    torch.manual_seed(0)
    return finished(tmp_path / "library", "chat")


@pytest.fixture
def other(library: Library, tmp_path: Path) -> Library:
    """law (two stacks) and math, each on its own; chat on top of math."""
    other = finished(tmp_path / "other", "law", "math", "chat", base=library.manifest.base)
    with other.writing():
        other.add_stack("law", 2, CONFIG, some_tensors(), a_round(2, loss=1.25), ["s001_law"])
        other.update_domain("chat", context=["s002_math", "s003_chat"], soft=True)
        other.write_protection("law", {"q": torch.eye(4)[:, :2]}, 0.5, 0.5, [])
    return other


def join(library: Library, other: Library, *only: str, **renamed: str) -> None:
    """`renamed`: new names by old ones."""
    with library.writing():
        library.join(other, joined_names(library, other, only, renamed))


def test_joined_domains_are_what_they_were(library: Library, other: Library) -> None:
    with library.writing():
        library.set_router(RouterEntry(files={}, domains=["chat"]))
    join(library, other, "law", "math", law="contracts")
    joined = Library.open(library.path)
    assert joined.verify() == [] and joined.manifest.router and joined.manifest.router.stale
    assert [stack.name for stack in joined.manifest.stacks] == [
        "s001_chat",
        "s002_contracts",
        "s003_contracts",
        "s004_math",
    ]
    assert joined.manifest.next_stack == 5
    pairs = {"s002_contracts": "s001_law", "s003_contracts": "s004_law", "s004_math": "s002_math"}
    for mine, theirs in pairs.items():
        assert joined.manifest.stack(mine).files == other.manifest.stack(theirs).files
    law, contracts = other.manifest.domain("law"), joined.manifest.domain("contracts")
    assert contracts.context == ["s002_contracts", "s003_contracts"] and contracts.done and contracts.protection is None
    assert [r.stack for r in contracts.rounds] == contracts.context
    assert [r.model_copy(update={"stack": None}) for r in contracts.rounds] == [
        r.model_copy(update={"stack": None}) for r in law.rounds
    ]
    assert contracts.validation == law.validation and joined.validation("contracts") == other.validation("law")
    with library.writing():
        assert library.add_stack("math", 2, CONFIG, some_tensors(), a_round(2)).name == "s005_math"


def unfinished(library: Library, other: Library) -> None:
    with other.writing():
        other.update_domain("math", done=False)


def another_base(library: Library, other: Library) -> None:
    with other.writing(), other._changing() as manifest:
        manifest.base.config_hash = "1" * 64


def another_dtype(library: Library, other: Library) -> None:
    with other.writing(), other._changing() as manifest:
        manifest.frozen_dtype = "bfloat16"


def a_removed_context(library: Library, other: Library) -> None:
    """Also where the other domain has left the library since."""
    with other.writing():
        other.remove_domain("math")


def nothing(library: Library, other: Library) -> None: ...


@pytest.mark.parametrize(
    ("prepare", "only", "renamed", "message"),
    [
        (nothing, [], {"chat": "talk"}, r"context: isolated.*--domain"),
        (a_removed_context, ["chat"], {"chat": "talk"}, r"chat on top of s002_math.*context: isolated"),
        (unfinished, ["law", "math"], {}, r"has not finished math: .*axolotl train.*--domain"),
        (another_base, ["law"], {}, r"another architecture: only libraries on the same base model"),
        (another_dtype, ["law"], {}, r"frozen_dtype.*bfloat16.*the same `frozen_dtype`"),
        (nothing, ["law"], {"law": "chat"}, r"two domains `chat`.*--as NEW=law"),
        (nothing, ["law", "math"], {"law": "math"}, r"two domains `math`.*--as NEW=math"),
        (nothing, ["law"], {"law": "Law"}, r"--as Law=law.*lower-case"),
        (nothing, ["medical"], {}, r"'medical' is not in the library, which has law, math, chat"),
        (nothing, ["law"], {"math": "sums"}, r"renames 'math'.*--domain"),
    ],
)
def test_what_cannot_be_joined_is_refused_and_nothing_changes(
    library: Library,
    other: Library,
    prepare: Callable[[Library, Library], None],
    only: list[str],
    renamed: dict[str, str],
    message: str,
) -> None:
    prepare(library, other)
    before = (library.path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        join(library, other, *only, **renamed)
    assert (library.path / "manifest.json").read_bytes() == before and library.verify() == []


def test_a_library_does_not_join_itself(library: Library, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(library.path)
    with pytest.raises(ValueError, match="the library itself"):
        join(library, Library.open(tmp_path / "again"), chat="talk")


def test_an_empty_library_takes_the_type_of_the_stacks(library: Library, other: Library, tmp_path: Path) -> None:
    another_dtype(library, other)
    empty = Library.create(tmp_path / "empty", library.manifest.base)
    join(empty, other, "law")
    assert empty.manifest.frozen_dtype == "bfloat16" and empty.verify() == []


@pytest.mark.parametrize(
    ("damage", "word"), [(truncate, "is truncated"), (alter_a_byte, "is altered"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("file", ["stack", "validation"])
def test_a_damaged_file_of_the_other_library_is_named_and_nothing_changes(
    library: Library, other: Library, damage: Callable[[Path], None], word: str, file: str
) -> None:
    path = weights(other, "s004_law") if file == "stack" else other.path / "validation/math.safetensors"
    damage(path)
    before = (library.path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=f"{path} {word}.*restore"):
        join(library, other, "law", "math")
    assert (library.path / "manifest.json").read_bytes() == before and library.verify() == []
    assert [path.name for path in (library.path / "stacks").iterdir()] == ["s001_chat"]


def test_trained_apart_and_joined_equals_trained_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    isolated = {"context": "isolated", "null_space": {"samples": 16}, "samples": {"prompts": 0}}
    config = curriculum_config(tiny_llama_dir, tmp_path, ["chat", "code"], **isolated)
    (tmp_path / "together").mkdir()
    both, runs = config["brainstacks"]["domains"], []
    for entry in both:
        folder = tmp_path / entry["name"]
        folder.mkdir()
        config["brainstacks"]["domains"], config["output_dir"] = [entry], str(folder / "out")
        runs.append((start_train(config, folder), folder))
    for process, folder in runs:
        finish([process], folder)
    config["brainstacks"]["domains"], config["output_dir"] = both, str(tmp_path / "together" / "out")
    train(config, tmp_path / "together")
    together, code = (Library.open(tmp_path / name / "out" / "library") for name in ("together", "code"))
    apart = Library.open(shutil.copytree(tmp_path / "chat" / "out" / "library", tmp_path / "apart"))
    join(apart, code)
    assert apart.manifest.stacks == together.manifest.stacks and len(apart.manifest.stacks) >= 2
    chat, other = (apart.manifest.stack(name).files for name in ("s001_chat", apart.manifest.domain("code").context[0]))
    assert chat["adapter_model.safetensors"] != other["adapter_model.safetensors"]
    for mine, theirs in zip(apart.manifest.domains, together.manifest.domains, strict=True):
        assert (mine.context, mine.rounds, mine.validation) == (theirs.context, theirs.rounds, theirs.validation)
    assert apart.verify() == []
