"""What a domain is kept out of; through the real command, measured here in float64 from the stacks' deltas."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from support.curricula import curriculum_config, write_domain
from support.models import base_config, chat_dataset
from support.processes import train
from support.routed import add_domain, new_library, random_rows, tiny_base, tuner_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.adapter.layer import BrainstacksLinear
from axolotl_brainstacks.adapter.nullspace import leakage
from axolotl_brainstacks.args import BrainstacksBlock, NullSpaceArgs
from axolotl_brainstacks.calibration import merge_columns
from axolotl_brainstacks.curriculum.build import attach_library
from axolotl_brainstacks.curriculum.ledger import Ledger
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.protection import check_columns, keep_out_of_others
from axolotl_brainstacks.curriculum.session import Session
from axolotl_brainstacks.curriculum.signals import Interruption
from axolotl_brainstacks.evaluation import unpack_rows
from axolotl_brainstacks.library import DomainEntry, Library
from axolotl_brainstacks.library.lora_import import import_lora
from axolotl_brainstacks.library.storage import record_of

DIRECTIONS = 2
KEY = "base_model.model.{}.brainstacks_B.weight"


def union_of(library: Library, domain: str) -> dict[str, Tensor]:
    """What `domain` is kept out of: all columns of the others."""
    protected = [d.name for d in library.manifest.domains if d.protection and d.name != domain]
    return merge_columns(library.protection(name) for name in protected)


@torch.no_grad()
def deltas_of(library: Library, domain: str) -> dict[str, Tensor]:
    """By projection (tokens, out), in float64: what the stacks of the domain's training context add on its rows."""
    base = AutoModelForCausalLM.from_pretrained(library.manifest.base.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(library.path)).eval()
    found: dict[str, list[Tensor]] = {}

    def collect(layer: BrainstacksLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        delta = (output - layer.base_layer(inputs[0]))[0].double()
        found.setdefault(layer.module_name, []).append(delta / len(delta) ** 0.5)

    for layer in model.base_model.brainstacks_layers():
        layer.register_forward_hook(collect)
    attached = [stack.name for stack in library.manifest.stacks]
    context = [stack for stack in library.manifest.domain(domain).context if stack in attached]
    with model.base_model.using_stacks(context):
        for row in unpack_rows(library.validation(domain)):
            model(input_ids=torch.tensor([row.input_ids]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def energy(deltas: dict[str, Tensor], columns: dict[str, Tensor]) -> float:
    captured = sum(float((delta @ columns[name].double()).square().sum()) for name, delta in deltas.items())
    return captured / sum(float(delta.square().sum()) for delta in deltas.values())


def best_energy(deltas: dict[str, Tensor], directions: int) -> float:
    """What `directions` columns of its own can hold at best, by SVD."""
    squares = [torch.linalg.svdvals(delta).square() for delta in deltas.values()]
    return float(sum(s[:directions].sum() for s in squares) / sum(s.sum() for s in squares))


def largest_leak(library: Library, stack: str, columns: dict[str, Tensor]) -> float:
    tensors = library.stack_tensors(stack)
    return max(leakage(tensors[KEY.format(name)], basis) for name, basis in columns.items())


def one_domain(model: Path, folder: Path, library: Path, name: str) -> dict[str, Any]:
    """A config that adds the domain `name` to a library."""
    folder.mkdir()
    rows = write_domain(folder / "rows.jsonl", name, 40, Random(name))
    return base_config(
        model, folder / "out", adapter="brainstacks", datasets=[chat_dataset(rows)], val_set_size=0.2, max_steps=8,
        learning_rate=1e-2, brainstacks={
            "library": str(library), "domain": name, "null_space": {"directions": DIRECTIONS, "samples": 16},
            "samples": {"prompts": 0}, "boosting": {"max_rounds": 2, "min_loss_delta": 0.0},
        },
    )  # fmt: skip


def test_removing_a_domain_takes_no_protection_from_the_others(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rules = {"directions": DIRECTIONS, "samples": 16}
    config = curriculum_config(
        tiny_llama_dir, tmp_path, ["chat", "code", "math"], null_space=rules, boosting={"max_rounds": 1}
    )
    train(config, tmp_path)
    kept, pruned = tmp_path / "out/library", tmp_path / "pruned"
    shutil.copytree(kept, pruned)
    with (library := Library.open(pruned)).writing():
        chats = library.manifest.domain("chat").protection
        library.remove_domain("code")
        assert library.manifest.domain("chat").protection == chats, (
            "nothing of what protects chat lay in code's columns"
        )
    held: dict[Path, dict[str, float]] = {}
    for path in (kept, pruned):
        train(
            one_domain(tiny_llama_dir, tmp_path / f"legal-{path.name}", path, "legal"), tmp_path / f"legal-{path.name}"
        )
        library = Library.open(path)
        union = union_of(library, "legal")
        assert all(basis.shape[1] == DIRECTIONS * (3 if path == kept else 2) for basis in union.values())
        for basis in union.values():
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
        held[path] = {}
        for name in ("chat", "math"):
            deltas = deltas_of(library, name)
            held[path][name] = energy(deltas, union)
            # At least as much as columns of its own alone could hold.
            assert held[path][name] >= best_energy(deltas, DIRECTIONS) - 1e-6
        constraint = library.manifest.domain("legal").constraint
        assert constraint is not None and constraint.protects == [d.name for d in library.manifest.domains[:-1]]
        assert constraint.energies == pytest.approx(
            {name: energy(deltas_of(library, name), union) for name in constraint.protects}, abs=0.02
        )
        assert constraint.capacity["k_proj"] == constraint.capacity_left == 1 - union[constraint.tightest].shape[1] / 64
        assert constraint.capacity["q_proj"] > constraint.capacity_left and len(constraint.capacity) == 7
        rounds = [stack.name for stack in library.manifest.stacks_of("legal")]
        assert rounds and all(largest_leak(library, stack, union) < 1e-5 for stack in rounds)
        assert library.verify() == []
    # With code go its columns, which hold a little of the others by chance.
    assert held[pruned] == pytest.approx(held[kept], abs=0.03)


def test_a_domain_is_kept_out_of_the_leading_directions_of_an_import(tiny_llama_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * torch.tensor([0.2, 0.1, 0.02, 0.01]))
    lora.save_pretrained(tmp_path / "lora")
    path = tmp_path / "library"
    import_lora(path, "sums", tmp_path / "lora")
    train(one_domain(tiny_llama_dir, tmp_path / "chat", path, "chat"), tmp_path / "chat")
    library = Library.open(path)
    leading = {}
    for key, tensor in library.stack_tensors("s001_sums").items():
        if "brainstacks_B" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".brainstacks_B.weight")
            leading[module] = torch.linalg.svd(tensor.double(), full_matrices=False)[0][:, :DIRECTIONS]
    assert len(leading) == 6
    assert library.manifest.stacks_of("chat")
    for stack in library.manifest.stacks_of("chat"):
        assert largest_leak(library, stack.name, leading) < 1e-5
    constraint = library.manifest.domain("chat").constraint
    assert constraint is not None and constraint.protects == ["sums"] and constraint.energies["sums"] > 0.9


# Without a command


def session_on(library: Library, base: torch.nn.Module) -> Session:
    """A session of no run, on a model that has all stacks of `library`, which is open for writing."""
    model = get_peft_model(deepcopy(base), BrainstacksConfig(task_type="CAUSAL_LM", r=2, num_experts=2, top_k=1))
    attach_library(tuner_of(model), library, "tiny")
    tuner = tuner_of(model)
    plan = Plan({}, BrainstacksBlock.parse({"domain": "another"}), library.path, inference=False)
    tokenizer: Any = None  # no answers are sampled
    return Session(model, tuner, tokenizer, Ledger(plan, tuner, library), Interruption(), library.path.parent, 4)


def test_a_domain_that_is_trained_again_is_kept_out_of_all_that_others_use(tmp_path: Path) -> None:
    """Also of what they share with its own old columns, beyond which theirs were fitted."""
    torch.manual_seed(0)
    base = tiny_base()
    library = new_library(tmp_path / "library", base, ["chat", "code"])
    rules, session = NullSpaceArgs(directions=2), session_on(library, base)
    with library.writing():
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        keep_out_of_others(session, "law", rules, 4)
        beyond = {d.name: d.protection and d.protection.beyond for d in library.manifest.domains}
        assert beyond == {"chat": [], "code": ["chat"], "law": None}
        library.replace_domain("chat")
        union = keep_out_of_others(session, "chat", rules, 4)
        entry = library.manifest.domain("code")
        assert entry.protection is not None and entry.protection.beyond == []
        assert library.manifest.domain("chat").protection is None
        again = keep_out_of_others(session, "chat", rules, 4)
    assert union.keys() == again.keys() and all(torch.equal(again[name], basis) for name, basis in union.items())
    constraint = library.manifest.domain("chat").constraint
    assert constraint is not None and constraint.protects == ["code"] and constraint.energies["code"] > 0.5


def test_a_domain_that_is_being_replaced_stays_protected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_base()
    library = new_library(tmp_path / "library", base, ["chat", "code"])
    session = session_on(library, base)
    with library.writing():
        library.replace_domain("chat")
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        keep_out_of_others(session, "law", NullSpaceArgs(directions=2), 4)
    constraint = library.manifest.domain("law").constraint
    assert constraint is not None and constraint.protects == ["chat", "code"]
    assert constraint.columns == 4 and constraint.energies["chat"] > 0.5


def test_without_directions_nothing_is_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_base()
    library = new_library(tmp_path / "library", base, ["chat"])
    with library.writing():
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        before = (library.path / "manifest.json").read_bytes()
        assert keep_out_of_others(session_on(library, base), "law", NullSpaceArgs(directions=0), 4) == {}
    assert (library.path / "manifest.json").read_bytes() == before


def test_columns_that_leave_no_direction_are_not_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_base()
    library = new_library(tmp_path / "library", base, [])
    # Three experts of rank 8 fill the 16 outputs of k_proj and v_proj.
    add_domain(library, base, "chat", rows=random_rows(30, Random(0)), settings={"r": 8})
    session = session_on(library, base)
    with library.writing():
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        before = (library.path / "manifest.json").read_bytes()
        with pytest.raises(ValueError, match=r"[kv]_proj.*brainstacks\.null_space\.directions"):
            keep_out_of_others(session, "law", NullSpaceArgs(directions=16), 4)
        assert (library.path / "manifest.json").read_bytes() == before
        assert keep_out_of_others(session, "law", NullSpaceArgs(directions=8), 4)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A library whose chat and code have columns, as law is about to train; and its base model."""
    torch.manual_seed(0)
    base = tiny_base()
    library = new_library(tmp_path_factory.mktemp("protected") / "library", base, ["chat", "code"])
    with library.writing():
        library.add_domain(DomainEntry(name="law", base_loss=2.0))
        keep_out_of_others(session_on(library, base), "law", NullSpaceArgs(directions=2), 4)
    return library.path, base


V_PROJ = "model.layers.0.self_attn.v_proj"  # 16 outputs
ODD_COLUMNS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Tensor]], object], str]] = {
    "another model's size": (lambda own, _: own.update({V_PROJ: torch.eye(24)[:, :2]}), "have 24 entries.*has 16"),
    "transposed": (lambda own, _: own.update({V_PROJ: own[V_PROJ].T.contiguous()}), "have 2 entries.*has 16"),
    "no projection": (lambda own, _: own.update({"model.layers.7.q_proj": torch.eye(16)[:, :2]}), "belong to no projection"),
    "a module without a stack": (lambda own, _: own.update({"lm_head": torch.eye(96)[:, :2]}), "belong to no projection"),
    "longer": (lambda own, _: own.update({V_PROJ: own[V_PROJ] * 1.01}), "are not orthonormal"),
    "not orthogonal": (lambda own, _: own[V_PROJ].add_(own[V_PROJ].flip(1) * 0.1), "are not orthonormal"),
    "zero": (lambda own, _: own[V_PROJ].zero_(), "are not orthonormal"),
    "another domain's": (lambda own, other: own.update({V_PROJ: other[V_PROJ]}), "overlap with those of earlier domains"),
    "too many": (lambda own, _: own.update({V_PROJ: torch.eye(16)}), "more than its 16 outputs"),
    "NaN": (lambda own, _: own[V_PROJ][3].fill_(float("nan")), "no columns of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_columns_that_do_not_fit_the_model_are_refused(
    protected: tuple[Path, PreTrainedModel], tmp_path: Path, kind: str
) -> None:
    """They have their true hash, as an author would see to."""
    library, base = Library.open(shutil.copytree(protected[0], tmp_path / "library")), protected[1]
    tuner = session_on(library, base).tuner
    check_columns(library, tuner)
    change, message = ODD_COLUMNS[kind]
    own = {name: tensor.clone() for name, tensor in library.protection("code").items()}
    change(own, library.protection("chat"))
    data = save({name: tensor.contiguous() for name, tensor in own.items()})
    with library.writing():
        fit = library.manifest.domain("code").protection
        assert fit is not None
        (library.path / fit.file).write_bytes(data)
        library.update_domain("code", protection=fit.model_copy(update={"record": record_of(data)}).model_dump())
    with pytest.raises(ValueError, match=rf"nullspace/code-.*{message}.*restore the file.*remove DOMAIN"):
        check_columns(library, tuner)


def test_columns_are_checked_before_anything_trains(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    library = new_library(tmp_path / "library", base, ["chat", "code"])
    columns = {"model.layers.0.self_attn.q_proj": torch.ones(128, 2)}
    with library.writing():
        library.write_protection("code", columns, 0.5, 0.5, [])
    log = train(one_domain(tiny_llama_dir, tmp_path / "law", library.path, "legal"), tmp_path, expect=1)
    assert "are not orthonormal" in log and "nullspace/code-" in log and "round 1 starts" not in log
    assert [domain.name for domain in Library.open(library.path).manifest.domains] == ["chat", "code"]


@pytest.mark.parametrize(
    ("block", "entry", "expected"),
    [
        ({}, {}, 64),
        ({"context": "isolated"}, {}, 0),
        ({"context": "isolated", "null_space": {"samples": 5}}, {}, 0),
        ({"context": "isolated", "null_space": {"directions": 64}}, {}, 64),
        ({"context": "isolated"}, {"null_space": {"samples": 5}}, 0),
        ({"context": "isolated"}, {"null_space": {"directions": 3}}, 3),
        ({"context": "isolated", "null_space": {"directions": 9}}, {"null_space": {"directions": 0}}, 0),
    ],
)
def test_isolated_domains_have_no_null_space_unless_it_is_asked_for(
    block: dict[str, Any], entry: dict[str, Any], expected: int
) -> None:
    parsed = BrainstacksBlock.parse(block | {"domains": [{"name": "law", "brainstacks": entry}]})
    assert parsed.settings_of("law").null_space.directions == expected
