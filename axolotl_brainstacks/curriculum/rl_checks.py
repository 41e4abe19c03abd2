"""What would go wrong late in an RL round, found in its keys and in the first rows of its data."""

from __future__ import annotations

from typing import Any

from axolotl.utils.dict import DictDefault
from datasets import Dataset

ONLINE = ("grpo", "gdpo")  # answers are generated while training, and rewarded

# Under `trl:` of an RL round.
REFUSED_TRL = {
    "use_vllm": "vLLM cannot compute the stack in training; leave it out, and Transformers generates the answers",
    "async_prefetch": "it needs vLLM, which cannot compute the stack in training",
    "use_data_producer": "it needs vLLM, which cannot compute the stack in training",
    "sync_ref_model": "the reference of a round is the model without the round's stack, and stays so",
    "reward_num_workers": "reward functions run in the training process, which watches what they return",
    "reward_processing_classes": "reward models are not supported; name functions in `trl.reward_funcs`",
}
_PAIRS = "a prompt with a chosen and a rejected answer"
# What a row holds, in words, and the columns of rows that Axolotl has prepared.
FORMS = {
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo"), (_PAIRS, {"prompt", "chosen", "rejected"})),
    "kto": ("a prompt with a completion and a label", {"prompt", "completion", "label"}),
    **dict.fromkeys(ONLINE, ("a prompt, and the columns that the reward functions read", {"prompt"})),
}


def rl_title(domain: str, number: int) -> str:
    """What errors call an RL round; `number` counts from 0, as in the YAML's list."""
    return f"rl_rounds[{number}] of domain `{domain}`"


def check_rl(overlay: dict[str, Any], where: str) -> None:
    """Raises ValueError for an RL round that lacks data of its own, or asks for what cannot be had."""
    if not overlay.get("datasets"):
        raise ValueError(
            f"`datasets:` is missing in {where}; give it rows of the form that `rl: {overlay['rl']}` learns from "
            f"({FORMS[overlay['rl']][0]})"
        )
    trl = overlay.get("trl") or {}
    for key, reason in REFUSED_TRL.items():
        if trl.get(key):
            raise ValueError(f"`trl.{key}` of {where} cannot be used with `adapter: brainstacks`: {reason}")
    if overlay["rl"] in ONLINE and not trl.get("reward_funcs"):
        raise ValueError(
            f"`trl.reward_funcs` is missing in {where}; name reward functions as module.function, for example "
            "`axolotl_brainstacks.rewards.numeric_answer`"
        )


def check_rows(dataset: Dataset, rl: str, where: str) -> None:
    """Raises ValueError when prepared rows lack a column that the trainer of `rl` reads."""
    form, columns = FORMS[rl]
    if missing := sorted(columns - set(dataset.column_names)):
        raise ValueError(
            f"The rows of `datasets:` of {where} have no `{missing[0]}`, and `rl: {rl}` learns from {form}; choose a `type:` "
            f"that makes it (the rows have {', '.join(dataset.column_names)})"
        )


def check_generations(cfg: DictDefault, processes: int, where: str) -> None:
    """Raises ValueError when the answers to one held-out prompt do not fit whole into a batch; Axolotl itself looks at
    training alone."""
    generations = int((cfg.trl or {}).get("num_generations") or 8)
    size = cfg.eval_batch_size or cfg.micro_batch_size
    if (size * processes) % generations:
        raise ValueError(
            f"`eval_batch_size` of {where} is {size}, times {processes} processes, which is no multiple of "
            f"`trl.num_generations` ({generations}), and each prompt is answered so often in one batch: change one of them"
        )
