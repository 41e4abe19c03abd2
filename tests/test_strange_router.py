"""Routers that a stranger made, or that do not belong to the library: refused before anything is made of them."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support.hostile import change_manifest, replace
from support.routed import new_library, tiny_base, tuner_of

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.router.router import CONFIG, WEIGHTS, Router, RouterConfig
from axolotl_brainstacks.router_args import GateArgs

DOMAINS = ["chat", "code", "math"]
GATE = GateArgs(gate_threshold=0.5, weights="soft", floors={})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    library = new_library(tmp_path / "library", tiny_base(), DOMAINS)
    Router.fresh(RouterConfig(domains=DOMAINS, features=32, width=16, dropout=0.1, gate=GATE), seed=2).save(library)
    return library.path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*run `axolotl brainstacks-router`"):
        Router.load(Library.open(path))


@pytest.mark.parametrize("left", [[], [CONFIG], [WEIGHTS]])
def test_both_files_are_listed(path: Path, left: list[str]) -> None:
    """Otherwise unhashed weights would route."""

    def only(manifest: dict[str, Any]) -> None:
        files = manifest["router"]["files"]
        manifest["router"]["files"] = {file: files[file] for file in left}

    change_manifest(path, only)
    missing = WEIGHTS if CONFIG in left else CONFIG
    refused(path, rf"{missing} is not listed")


@pytest.mark.parametrize(
    "domains", [["chat", "math", "code"], ["code", "chat"], [*DOMAINS, "law"], [*DOMAINS, "chat"], []]
)
def test_the_domains_are_the_librarys_in_its_order(path: Path, domains: list[str]) -> None:
    """In another order every domain would get another one's probability."""
    change_manifest(path, lambda manifest: manifest["router"].update(domains=domains))
    refused(
        path, "knows .*but the library has chat, code, math|the router knows domain .law., which is not listed|twice"
    )
    change_manifest(path, lambda manifest: manifest["router"].update(domains=DOMAINS))
    config = json.loads((path / CONFIG).read_text()) | {"domains": domains}
    replace(path, CONFIG, json.dumps(config).encode())
    refused(path, "is of the domains .*not the library's")


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**9}, {"width": 2**40}, {"features": 10**12}, {"features": 10**30}, {"width": 18}, {"width": 0},
        {"width": -16}, {"width": "wide"}, {"features": None}, {"dropout": 1.5}, {"dropout": float("nan")},
        {"max_tokens": 0}, {"max_tokens": -4}, {"gate": {"gate_threshold": 2}}, {"gate": None}, {"new": 1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit_the_weights_are_refused_and_nothing_is_made(
    path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(path, CONFIG, json.dumps(json.loads((path / CONFIG).read_text()) | changes).encode())
    monkeypatch.setattr(Router, "fresh", lambda *_, **__: pytest.fail("a network of that size is made"))
    refused(path, "damaged or was written by another version")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5])
def test_a_config_that_is_none_is_refused(path: Path, content: bytes) -> None:
    replace(path, CONFIG, content)
    refused(path, "damaged or was written by another version")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(path: Path, value: float) -> None:
    tensors, rng = load((path / WEIGHTS).read_bytes()), Random(3)
    key = rng.choice(list(tensors))
    tensors[key].view(-1)[-1] = value
    replace(path, WEIGHTS, save(tensors))
    refused(path, rf"damaged[\s\S]*{key}")


@pytest.mark.parametrize("change", ["less", "more", "half", "garbage", "shape", "one too many", "none"])
def test_weights_of_another_kind_are_refused(path: Path, change: str) -> None:
    tensors = load((path / WEIGHTS).read_bytes())
    if change == "less":
        del tensors["project.weight"]
    if change == "more":
        tensors["other"] = torch.zeros(2)
    if change == "half":
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    if change == "shape":
        tensors["hidden.weight"] = torch.zeros(3, 3)
    if change in ("one too many", "none"):  # torch would read a scalar from a vector, and fail on an empty one
        tensors["temperature"] = torch.ones(1 if change == "one too many" else 0)
    replace(path, WEIGHTS, b"no tensors" if change == "garbage" else save(tensors))
    refused(path, "damaged or was written by another version")


def test_what_a_damaged_config_says_reaches_no_terminal(path: Path) -> None:
    config = json.loads((path / CONFIG).read_text()) | {"\x1b[2J": 1}
    replace(path, CONFIG, json.dumps(config).encode())
    with pytest.raises(ValueError, match=r"\\x1b\[2J[\s\S]*run `axolotl brainstacks-router`") as caught:
        Router.load(Library.open(path))
    assert str(caught.value).isprintable()


def test_a_router_of_another_model_says_so(path: Path) -> None:
    from peft import PeftModel

    router = Router.fresh(RouterConfig(domains=DOMAINS, features=24, width=16, dropout=0.1, gate=GATE), seed=4)
    library = Library.open(path)
    router.save(library)
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(tiny_base(), str(path))
    with pytest.raises(ValueError, match=r"reads 24 features a token, but the model has 32.*brainstacks-router"):
        tuner_of(model).route(torch.tensor([[1, 2, 3]]))
