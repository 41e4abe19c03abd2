"""A domain that is trained again in place: its old stacks answer until the new ones are complete."""

from copy import deepcopy
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from support.random_library import CONFIG, a_domain, a_round, new_library, some_tensors
from support.routed import add_domain, random_rows, tiny_base, tuner_of
from support.routed import new_library as living_library

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import RouterEntry
from axolotl_brainstacks.router.router import routable_domains


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """chat (two stacks), code and math on top of it, all finished and protected in this order."""
    torch.manual_seed(0)
    library = new_library(tmp_path / "library", "chat")
    with library.writing():
        library.add_stack("chat", 2, CONFIG, some_tensors(), a_round(2, loss=1.25))
        for name in ("code", "math"):
            library.add_domain(a_domain(name), f"rows of {name}".encode())
            earlier = [stack.name for stack in library.manifest.stacks]
            library.add_stack(name, 1, CONFIG, some_tensors(), a_round(), earlier)
        for number, name in enumerate(("chat", "code", "math")):
            library.write_protection(
                name, {"q": torch.eye(8)[:, number : number + 1]}, 0.5, 0.5, ["chat", "code"][:number]
            )
        for name in ("chat", "code", "math"):
            library.finish_domain(name)
        library.set_router(RouterEntry(files={}, domains=["chat", "code", "math"]))
    return library


def new_stack(library: Library, domain: str, number: int = 1) -> str:
    context = library.manifest.training_context(domain, isolated=False)
    return library.add_stack(domain, number, CONFIG, some_tensors(), a_round(number, loss=1.0), context).name


def names(library: Library) -> list[str]:
    return [stack.name for stack in library.manifest.stacks]


def active(library: Library) -> list[str]:
    return [stack.name for stack in library.manifest.active_stacks]


OLD = ["s001_chat", "s002_chat", "s003_code", "s004_math"]


def test_the_old_stacks_answer_until_the_new_ones_are_complete(library: Library) -> None:
    with library.writing():
        assert library.replace_domain("chat") == ["code", "math"]
        assert (active(library), routable_domains(library.manifest)) == (OLD, ["chat", "code", "math"])
        for number, name in enumerate(["s005_chat", "s006_chat"], start=1):
            assert new_stack(library, "chat", number) == name
            assert active(library) == OLD and library.verify() == []
        assert library.manifest.router and not library.manifest.router.stale
        assert [d.name for d in library.manifest.domains] == ["chat", "code", "math"]
        entry = library.finish_domain("chat")
    assert entry.done and entry.before is None and entry.replaced == []
    assert [record.stack for record in entry.rounds] == ["s005_chat", "s006_chat"] == entry.context
    assert library.manifest.router and library.manifest.router.stale
    assert active(library) == names(library) == ["s003_code", "s004_math", "s005_chat", "s006_chat"]
    assert library.manifest.domain("code").context == ["s005_chat", "s006_chat", "s003_code"]
    assert library.manifest.domain("math").context == ["s005_chat", "s006_chat", "s003_code", "s004_math"]
    assert [domain.protection for domain in library.manifest.domains] == [None] * 3
    assert library.verify() == [] and not (library.path / "stacks/s001_chat").exists()


def test_a_domain_trains_on_those_before_it_and_its_own_new_stacks(library: Library) -> None:
    def context(name: str, isolated: bool = False) -> list[str]:
        return library.manifest.training_context(name, isolated)

    assert context("law") == OLD and context("law", isolated=True) == []
    assert context("code") == OLD[:3] and context("code", isolated=True) == ["s003_code"]
    with library.writing():
        library.replace_domain("code")
        assert context("code") == ["s001_chat", "s002_chat"] and context("code", isolated=True) == []
        new_stack(library, "code")
        assert context("code") == ["s001_chat", "s002_chat", "s005_code"]
        assert context("code", isolated=True) == ["s005_code"]
        assert context("math") == OLD and context("law") == OLD, "others see what answers"
        library.replace_domain("chat")
        new_stack(library, "chat")
        assert context("chat") == ["s006_chat"]
        assert context("code") == ["s001_chat", "s002_chat", "s005_code"]


@pytest.mark.parametrize("stacks", [0, 2])
def test_undo_puts_everything_back(library: Library, stacks: int) -> None:
    before = library.manifest
    with library.writing():
        library.replace_domain("code")
        library.renew_validation("code", 3.5, b"other rows", 1)
        for number in range(1, stacks + 1):
            new_stack(library, "code", number)
        library.undo_replacement("code")
    after = library.manifest
    undone = before.model_copy(update={"next_stack": before.next_stack + stacks}, deep=True)
    undone.unprotect("code")  # the next training fits it again
    assert after == undone
    assert library.verify() == [] and library.validation("code") == b"rows of code"
    assert len(list((library.path / "validation").iterdir())) == 3


def test_other_validation_rows_stand_beside_the_old_ones_until_the_end(library: Library) -> None:
    with library.writing():
        library.replace_domain("code")
        library.renew_validation("code", 3.5, b"other rows", 1)
        assert library.validation("code") == b"other rows" and library.verify() == []
        before = library.manifest.domain("code").before
        assert before is not None and library.validation_of(before) == b"rows of code"
        new_stack(library, "code")
        library.finish_domain("code")
    entry = library.manifest.domain("code")
    assert entry.base_loss == 3.5 and library.validation("code") == b"other rows" and library.verify() == []
    assert not (library.path / "validation/code.safetensors").exists()


def test_without_a_new_stack_the_old_ones_stay(library: Library) -> None:
    before = library.manifest
    with library.writing():
        library.replace_domain("chat")
        library.record_round("chat", a_round(1, kept=False))
        assert library.finish_domain("chat").done
    before.unprotect("chat")
    assert library.manifest == before


def test_what_cannot_be_replaced_is_refused_and_nothing_changes(library: Library) -> None:
    with library.writing():
        library.add_domain(a_domain("law"))
        library.replace_domain("code")
        before = (library.path / "manifest.json").read_bytes()
        for name, message in {
            "medical": "'medical' is not in the library, which has chat, code, math, law",
            "law": "'law' is not finished.*axolotl train",
            "code": "'code' is being replaced already.*--undo",
        }.items():
            with pytest.raises(ValueError, match=message):
                library.replace_domain(name)
        with pytest.raises(ValueError, match="'chat' is not being replaced"):
            library.undo_replacement("chat")
    assert (library.path / "manifest.json").read_bytes() == before


def test_removing_a_domain_that_is_being_replaced_removes_old_and_new_stacks(library: Library) -> None:
    with library.writing():
        library.replace_domain("code")
        new_stack(library, "code")
        library.remove_domain("code")
    assert names(library) == ["s001_chat", "s002_chat", "s004_math"] and library.verify() == []


def test_answers_stay_as_they_were(tmp_path: Path) -> None:
    """Loaded through PEFT, with the new stack on disk: logits with all stacks on, and by domain, to the last bit."""
    torch.manual_seed(0)
    base = tiny_base()
    library = living_library(tmp_path / "library", base, ["chat", "math"])
    ids = torch.randint(0, 96, (2, 9))

    def answers() -> list[torch.Tensor]:
        model = PeftModel.from_pretrained(deepcopy(base), str(library.path)).eval()
        with torch.no_grad():
            everything = model(ids).logits
            with tuner_of(model).routed(domains={"chat": 1.0}):
                return [everything, model(ids).logits]

    expected = answers()
    add_domain(library, base, "law", rows=random_rows(4, Random(0)))
    with library.writing():
        tensors, config = library.stack_tensors("s003_law"), library.stack_config("s003_law")
        library.remove_domain("law")
        library.replace_domain("chat")
        library.add_stack("chat", 1, config, tensors, a_round())
    assert all(torch.equal(*pair) for pair in zip(answers(), expected, strict=True))
    with library.writing():
        library.finish_domain("chat")
    assert not any(torch.equal(*pair) for pair in zip(answers(), expected, strict=True))
