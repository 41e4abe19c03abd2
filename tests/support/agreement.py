"""Engines that several processes can train under, and how much two libraries of one curriculum differ."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_brainstacks.library import Library
from support.curricula import curriculum_config

ENGINES = ["ddp", "zero1", "zero2", "zero3"]


def with_engine(config: dict[str, Any], engine: str, folder: Path) -> dict[str, Any]:
    """`config` with `deepspeed:` naming a file with the keys of the one that Axolotl ships, or without it for DDP."""
    if engine == "ddp":
        return config
    stages: dict[str, dict[str, Any]] = {
        "zero1": {"overlap_comm": True},
        "zero2": {"overlap_comm": True, "contiguous_gradients": True},
        "zero3": {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 0,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            # The shipped "auto" would keep all of a tiny model's parameters whole.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    settings = {
        "zero_optimization": {"stage": int(engine[-1]), **stages[engine]},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{engine}.json"
    path.write_text(json.dumps(settings))
    return config | {"deepspeed": str(path)}


def comparable_config(model: Path, folder: Path) -> dict[str, Any]:
    """A curriculum whose result depends on the global batch alone, not on who computes which part of it.

    In order, because one process and two shuffle differently. Answers of equally many tokens, as Axolotl averages the
    loss over processes, not over tokens. No load-balance loss, which is not linear in the tokens of a micro-batch. All
    experts for every token, or rounding decides which one a near tie drops. A large epsilon, or Adam moves weights whose
    gradient is nothing but rounding as far as all others.
    """
    config = curriculum_config(
        model, folder, ["code", "math"], noisy_gate=False, top_k=4, balance_coef=0.0, samples={"prompts": 0},
        router={"width": 16, "epochs": 1, "mixed_pairs": 2},
    )  # fmt: skip
    return config | {
        "curriculum_sampling": True,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-4,
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 1000,
    }


def losses(library: Library) -> list[float]:
    """The validation loss after each round, in the order of training."""
    return [record.loss_after for entry in library.manifest.domains for record in entry.rounds]


def shapes_hash(library: Library) -> str:
    """SHA-256 over the sorted keys and shapes of all stacks."""
    lines = sorted(
        f"{stack.name} {key} {tuple(tensor.shape)}\n"
        for stack in library.manifest.stacks
        for key, tensor in library.stack_tensors(stack.name).items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """loss_difference: largest relative one of any round. weight_difference: largest absolute one of any stack."""

    same_shapes: bool
    loss_difference: float
    weight_difference: float


def compare(library: Library, reference: Library) -> Difference:
    pairs = zip(losses(library), losses(reference), strict=True)
    return Difference(
        shapes_hash(library) == shapes_hash(reference),
        max(abs(one - other) / other for one, other in pairs),
        max(
            float((tensor - reference.stack_tensors(stack.name)[key]).abs().max())
            for stack in library.manifest.stacks
            for key, tensor in library.stack_tensors(stack.name).items()
        ),
    )
