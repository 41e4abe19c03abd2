import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.routed import add_domain, new_library, tiny_base
from transformers import PreTrainedModel

from axolotl_brainstacks.args import BrainstacksBlock
from axolotl_brainstacks.library import DomainEntry, Library
from axolotl_brainstacks.router.router import CONFIG, WEIGHTS, Router, RouterConfig, routable_domains, spread
from axolotl_brainstacks.router.thresholds import gate
from axolotl_brainstacks.router_args import RouterArgs

DOMAINS = ["chat", "code", "math"]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_base()


@pytest.fixture
def library(base: PreTrainedModel, tmp_path: Path) -> Library:
    return new_library(tmp_path / "library", base, DOMAINS, stacks=2)


def router(domains: list[str] = DOMAINS, **settings: Any) -> Router:
    gate_args = RouterArgs(**settings).gate()
    return Router.fresh(RouterConfig(domains=domains, features=24, width=16, dropout=0.1, gate=gate_args), seed=1)


PROBABILITIES = torch.tensor([[0.9, 0.05, 0.3], [0.11, 0.02, 0.0], [0.12, 0.5, 1.0]])


def test_soft_weights_are_the_probabilities_that_pass() -> None:
    weights, uncovered = gate(PROBABILITIES, DOMAINS, RouterArgs(gate_threshold=0.12, weights="soft").gate())
    assert torch.equal(weights, torch.tensor([[0.9, 0, 0.3], [0, 0, 0], [0.12, 0.5, 1.0]]))
    assert uncovered.tolist() == [False, True, False]


def test_hard_weights_are_one() -> None:
    weights, _ = gate(PROBABILITIES, DOMAINS, RouterArgs(gate_threshold=0.3, weights="hard").gate())
    assert torch.equal(weights, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_floor_lifts_a_domain_but_covers_no_prompt(kind: str) -> None:
    args = RouterArgs(gate_threshold=0.12, weights=kind, floors={"chat": 0.2}).gate()
    weights, uncovered = gate(PROBABILITIES, DOMAINS, args)
    assert weights[:, 0].tolist() == pytest.approx([0.9, 0.2, 0.2] if kind == "soft" else [1, 0.2, 1])
    assert uncovered.tolist() == [False, True, False]


def test_all_stacks_of_a_domain_get_its_weight_and_unused_domains_are_left_out(library: Library) -> None:
    weights = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.25]])
    names, factors = spread(weights, DOMAINS, library.manifest.stacks)
    assert names == ["s001_chat", "s002_chat", "s005_math", "s006_math"]
    assert factors.tolist() == [[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.25, 0.25]]
    names, factors = spread(torch.zeros(2, 3), DOMAINS, library.manifest.stacks)
    assert names == [] and factors.shape == (2, 0)


def test_a_saved_router_routes_alike(library: Library) -> None:
    fitted = router(floors={"chat": 0.2}, weights="hard", gate_threshold=0.5)
    hidden, mask = torch.randn(4, 7, 24), torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    route = fitted.route(hidden, mask)
    fitted.save(library)
    loaded = Router.load(Library.open(library.path))
    again = loaded.route(hidden, mask)
    assert loaded.config == fitted.config
    assert torch.equal(again.weights, route.weights) and torch.equal(again.probabilities, route.probabilities)
    assert torch.equal(again.uncovered, route.uncovered)
    assert library.verify() == []
    names, weights = loaded.stack_weights(again, library.manifest.stacks)
    assert weights.shape == (4, len(names)) and "s001_chat" in names


def test_routes_do_not_depend_on_the_rest_of_the_batch(library: Library) -> None:
    fitted = router()
    hidden, mask = torch.randn(4, 7, 24), torch.arange(7) < torch.tensor([[7], [3], [5], [1]])
    together = fitted.route(hidden, mask).probabilities
    alone = torch.cat([fitted.route(hidden[i : i + 1], mask[i : i + 1]).probabilities for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_a_library_without_a_router(library: Library) -> None:
    with pytest.raises(ValueError, match=r"has no router: run `axolotl brainstacks-router`"):
        Router.load(library)


def test_a_stale_router_is_refused(library: Library) -> None:
    router().save(library)
    with library.writing():
        library.remove_domain("code")
    with pytest.raises(ValueError, match="stale"):
        Router.load(Library.open(library.path))


def test_a_router_of_other_domains_is_refused(library: Library, base: PreTrainedModel) -> None:
    router().save(library)
    add_domain(library, base, "medical")
    with pytest.raises(ValueError, match="knows chat, code, math, but the library has chat, code, math, medical"):
        Router.load(Library.open(library.path))


def test_unfinished_domains_and_domains_without_stacks_are_not_routed(library: Library) -> None:
    router().save(library)
    with library.writing():
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        library.update_domain("law", done=True)
        library.update_domain("math", done=False)
    assert routable_domains(library.manifest) == ["chat", "code"]


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_router_is_refused(library: Library, file: str) -> None:
    router().save(library)
    path = library.path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{Path(file).name} is altered.*brainstacks-router"):
        Router.load(Library.open(library.path))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{Path(file).name} is missing"):
        Router.load(Library.open(library.path))


def test_a_router_of_another_version_is_refused(library: Library) -> None:
    fitted = router()
    fitted.save(library)
    with library.writing():
        entry = library.manifest.router
        assert entry is not None
        config = json.loads((library.path / CONFIG).read_text()) | {"width": 18}
        entry.files[CONFIG] = library.write_file(CONFIG, json.dumps(config).encode())
        library.set_router(entry)
    with pytest.raises(ValueError, match="another version"):
        Router.load(Library.open(library.path))


def test_a_router_of_the_version_before_calibration_still_loads(library: Library) -> None:
    fitted = router()
    fitted.save(library)
    config = {
        "domains": DOMAINS, "features": 24, "width": 16, "dropout": 0.1, "max_tokens": 256,
        "gate": {"gate_threshold": 0.3, "weights": "hard", "floors": {"chat": 0.2}},
    }  # fmt: skip
    with library.writing():
        entry = library.manifest.router
        assert entry is not None
        entry.files[CONFIG] = library.write_file(CONFIG, json.dumps(config).encode())
        library.set_router(entry)
    gate_args = Router.load(Library.open(library.path)).config.gate
    assert (gate_args.gate_threshold, gate_args.weights, gate_args.floors) == (0.3, "hard", {"chat": 0.2})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"floors": {"chat": 1.2}}, "floors.chat"),
        ({"floors": {"chat": -0.1}}, "floors.chat"),
        ({"gate_threshold": 1.01}, "gate_threshold"),
        ({"gate_threshold": -0.01}, "gate_threshold"),
        ({"search": "random"}, "search"),
        ({"samples": 2}, "samples"),
        ({"label_blend": 2}, "label_blend"),
        ({"hidden": 2}, "hidden"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        RouterArgs(**settings)


def test_the_block_takes_every_router_setting() -> None:
    settings = RouterArgs().model_dump()
    block = BrainstacksBlock.model_validate({"domain": "chat", "router": settings})
    assert block.router == RouterArgs()
