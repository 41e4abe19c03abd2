"""Attacks on answers: a stranger's library, with true hashes, loaded by PEFT around a tiny model, routed and asked.

What a stack or a router says is its author's business. All else has to be as in the honest library, bit for bit: the base
model, other domains' answers, and the rows of others in the same batch.
"""

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LlamaForCausalLM

from axolotl_brainstacks.library import Library
from axolotl_brainstacks.library.entries import CONFIG, WEIGHTS
from axolotl_brainstacks.router import router
from support.answering import random_router
from support.fuzzed_files import contents_to_read
from support.fuzzing import ODD, Attack, Wrong, damaged, mutated, odd_tensors, odd_text
from support.hostile import change_manifest, replace
from support.routed import VOCABULARY, new_library, tiny_base, tuner_of

DOMAINS = ["chat", "code"]
ATTACKED, SPARED = DOMAINS
LAYER = "base_model.model.model.layers"
# Where a stack could claim to sit: on other modules of the model, on what is none, and on one projection by another name.
MODULES = (
    *("lm_head", "model.embed_tokens", "model.norm", "model", "", "model.layers", "model.layers.0.self_attn"),
    *("model.layers.9.mlp.up_proj", "model.layers.0.mlp.act_fn", "generation_config", "__class__"),
    *("model.layers.-1.mlp.up_proj", "model.layers.00.mlp.up_proj", "model.layers.0.self_attn.q_proj.base_layer"),
    "model.layers.0.self_attn.q_proj.bank",
)


@cache
def base() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tiny_base()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def prompts() -> Tensor:
    return torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


def library_with_router(path: Path, rng: Random) -> Library:
    """Two domains of a stack each, a router whose routes differ from prompt to prompt, and records."""
    torch.manual_seed(rng.randrange(2**32))
    library = new_library(path, base(), DOMAINS)
    random_router(DOMAINS, seed=3).save(library)
    with library.writing():
        for file, content in contents_to_read(rng).items():
            library.write_file(file, content)
    return library


@dataclass
class Asked:
    """What a library answers: logits of the base, of each domain's stacks, of all, of rows that differ, as the router
    says, and of the first token generated; and what the router says."""

    logits: dict[str, Tensor]
    routes: list[dict[str, float]]


@torch.no_grad()
def asked(folder: Path) -> Asked:
    """Raises Wrong when the base model's weights are altered, or when its own rows are no numbers."""
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(folder)).eval()
    tuner, ids = tuner_of(model), prompts()
    routes = [dict(route.weights) for route in model.route(ids)]
    logits = {}
    for name, domains in (("base", {}), *((name, {name: 1.0}) for name in DOMAINS), ("mixed", rows())):
        with tuner.routed(domains=domains):
            logits[name] = model(ids).logits
    logits["all"] = model(ids).logits
    with tuner.routed(ids):
        logits["routed"] = model(ids).logits
    with tuner.routed(domains=routes):
        named = model(ids).logits
    logits["generated"] = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    if not torch.equal(logits["routed"].nan_to_num(), named.nan_to_num()):
        raise Wrong("a routed answer is not that of the route that is shown")
    honest = dict(base().named_parameters())
    for name, tensor in tuner.model.named_parameters():
        if not torch.equal(tensor, honest[name.replace(".base_layer", "")]):
            raise Wrong(f"{name} of the base model is altered")
    return Asked(logits, routes)


def rows() -> list[dict[str, float]]:
    """One a prompt: of the attacked domain, of the spared one, of none."""
    return [{ATTACKED: 1.0}, {SPARED: 1.0}, {}]


_honest: dict[str, Asked] = {}


def honest(folder: Path) -> Asked:
    key = Library.open(folder).sha256
    if key not in _honest:
        _honest[key] = asked(folder)
    return _honest[key]


def compare(found: Asked, expected: Asked, *same: str) -> None:
    """Raises Wrong unless the logits named are the expected ones, and the routes are some."""
    for name in same:
        if not torch.equal(found.logits[name], expected.logits[name]):
            raise Wrong(f"another answer: {name}")
    # Beside the attacked domain's row; sums over fewer or more ranks are rounded otherwise.
    for name, row, tolerance in (("spared", 1, 1e-4), ("base", 2, 0)):
        if not torch.allclose(
            found.logits["mixed"][row], expected.logits["mixed"][row], rtol=tolerance, atol=tolerance
        ):
            raise Wrong(f"the attacked domain's row changes the {name} one in the batch")
    for route in found.routes:
        if not (route.keys() <= set(DOMAINS) and all(0 <= weight <= 1 for weight in route.values())):
            raise Wrong(f"a route {route}")


EVERYTHING = ("base", *DOMAINS, "all", "routed", "generated", "mixed")


# Attacks


def router_files(folder: Path, rng: Random) -> None:
    """Its settings, thresholds among them, its network, or what the manifest says of it. Named domains answer as ever."""
    expected = honest(folder)
    match rng.randrange(4):
        case 0:
            replace(folder, router.CONFIG, odd_text(json.loads((folder / router.CONFIG).read_text()), rng))
        case 1:
            settings = json.loads((folder / router.CONFIG).read_text())
            settings["gate"] = mutated(settings["gate"] | {"floors": {rng.choice([*DOMAINS, "x"]): 0.3}}, rng)
            replace(folder, router.CONFIG, json.dumps(settings).encode())
        case 2:
            replace(folder, router.WEIGHTS, odd_tensors(load_file(folder / router.WEIGHTS), rng))
        case _:
            change_manifest(folder, lambda manifest: manifest.update(router=mutated(manifest["router"], rng)))
    compare(asked(folder), expected, "base", *DOMAINS, "all", "mixed")


def router_records(folder: Path, rng: Random) -> None:
    """Prompts, losses and figures that the router was made from: no answer comes from them."""
    expected, files = honest(folder), contents_to_read(rng)
    file = rng.choice(sorted(files))
    replace(folder, file, damaged(files[file], rng) if rng.random() < 0.5 else rng.randbytes(50))
    compare(asked(folder), expected, *EVERYTHING)


def root_config(folder: Path, rng: Random) -> None:
    """What PEFT reads first. It holds no weight, so a library that loads answers as ever."""
    expected = honest(folder)
    config = json.loads((folder / CONFIG).read_text())
    match rng.randrange(4):
        case 0:
            replace(folder, CONFIG, odd_text(config, rng))
        case 1:
            replace(folder, CONFIG, json.dumps(config | {rng.choice(sorted(config)): rng.choice(ODD)}).encode())
        case 2:
            extra = {
                "auto_mapping": {"base_model_class": "os", "parent_library": "os"}, "modules_to_save": ["lm_head"],
                "target_modules": ["lm_head"], "exclude_modules": "(", "layers_to_transform": [0], "r": 10**9,
                "peft_type": rng.choice(["LORA", "IA3", "PROMPT_TUNING", 3]), "peft_version": "99", "is_prompt_learning": True,
                "library": rng.choice(["..", "/", "stacks/s001_chat", None, 3]), "runtime_config": {}, "lora_bias": True,
            }  # fmt: skip
            key = rng.choice(sorted(extra))
            replace(folder, CONFIG, json.dumps(config | {key: extra[key]}).encode())
        case _:
            tensors = {
                f"{LAYER}.0.self_attn.q_proj.{rng.choice(['weight', 'brainstacks_A.weight'])}": torch.ones(32, 32)
            }
            replace(folder, WEIGHTS, odd_tensors(tensors, rng))
    try:
        found = asked(folder)
    except Exception as error:
        if read_by_peft_alone(folder):
            raise ValueError(f"PEFT: {error!r}") from error
        raise
    compare(found, expected, *EVERYTHING)


def read_by_peft_alone(folder: Path) -> bool:
    """Whether PEFT does not learn from the config that it is ours: it says in its own words what it minds."""
    try:
        return json.loads((folder / CONFIG).read_bytes()).get("peft_type") != "BRAINSTACKS"
    except (ValueError, RecursionError, AttributeError):
        return True


def stack_configs(folder: Path, rng: Random) -> None:
    """Of one domain: its own answers are its author's, all others are as ever. The stack alone is an adapter too."""
    expected, file = honest(folder), f"stacks/s001_{ATTACKED}/{CONFIG}"
    config = json.loads((folder / file).read_text())
    if rng.random() < 0.5:
        replace(folder, file, odd_text(config, rng))
    else:
        key = rng.choice(["r", "num_experts", "top_k", "lora_alpha", "use_rslora", "lora_dropout", *sorted(config)])
        replace(folder, file, json.dumps(config | {key: rng.choice([*ODD, 1, 2, 6, 10, 1e6, 0.5])}).encode())
    compare(asked(folder), expected, "base", SPARED)
    stack_alone(folder)


def stack_tensors(folder: Path, rng: Random) -> None:
    """As `stack_configs`, for the weights."""
    expected, file = honest(folder), f"stacks/s001_{ATTACKED}/{WEIGHTS}"
    tensors = load_file(folder / file)
    data = odd_tensors(tensors, rng) if rng.random() < 0.5 else save(strange_stack(tensors, rng))
    replace(folder, file, data)
    compare(asked(folder), expected, "base", SPARED)
    stack_alone(folder)


def strange_stack(tensors: dict[str, Tensor], rng: Random) -> dict[str, Tensor]:
    """With what a stack of another author could hold: values at the edge, other keys, other sizes."""
    key = rng.choice(sorted(tensors))
    pair = {side: key[: key.index("brainstacks_")] + f"brainstacks_{side}.weight" for side in "AB"}
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    match rng.randrange(6):
        case 0:
            value = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e20, 1e6, 1e-45])
            found[key].view(-1)[rng.randrange(found[key].numel())] = value
        case 1:
            scale = rng.choice([1e6, 1e3, -1.0, 1e-30])
            found = {name: tensor * scale for name, tensor in found.items()}
        case 2:
            module = rng.choice(MODULES)
            shapes = {"A": found[pair["A"]].shape, "B": (rng.choice([32, VOCABULARY, 48]), found[pair["B"]].shape[1])}
            for side, shape in shapes.items():
                found[f"base_model.model.{module}.brainstacks_{side}.weight"] = torch.ones(shape) * 0.1
        case 3:
            for side in rng.choice(["A", "B", "AB"]):
                del found[pair[side]]
        case 4:
            found[pair["A"]], found[pair["B"]] = found[pair["B"]].T.contiguous(), found[pair["A"]].T.contiguous()
        case _:
            dtype = rng.choice([torch.bfloat16, torch.float16, torch.float64, torch.int8])
            found = {name: tensor.to(dtype) for name, tensor in found.items()}
    return found


@torch.no_grad()
def stack_alone(folder: Path) -> None:
    """Loaded from its own folder, a stack leaves the base's weights as they are."""
    model = PeftModel.from_pretrained(copy.deepcopy(base()), str(folder / f"stacks/s001_{ATTACKED}")).eval()
    model(prompts())
    with model.disable_adapter():
        if not torch.equal(model(prompts()).logits, base()(prompts()).logits):
            raise Wrong("the base model is altered by a stack's folder")


ATTACKS = {
    name: Attack(library_with_router, attempt)
    for name, attempt in {
        "router, answering": router_files,
        "the router's records, answering": router_records,
        "root config and weights, answering": root_config,
        "stack configs, answering": stack_configs,
        "stack tensors, answering": stack_tensors,
    }.items()
}
