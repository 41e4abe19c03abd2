"""Finds mistakes in an RL round's keys and columns that would only show when the round trains, hours later."""

from __future__ import annotations

from typing import Any

from axolotl.utils.dict import DictDefault
from datasets import Dataset

from axolotl_brainstacks.args import RLRoundArgs

# Online methods generate completions while training, and score them with reward functions.
ONLINE = ("grpo", "gdpo")

# Keys below `trl:` of an RL round, each with the reason.
REFUSED_TRL = {
    "use_vllm": "vLLM cannot compute the stack in training; leave it out, and Transformers generates the answers",
    "async_prefetch": "it needs vLLM, which cannot compute the stack in training",
    "use_data_producer": "it needs vLLM, which cannot compute the stack in training",
    "sync_ref_model": "the reference of a round is the model without the round's stack, and stays so",
    "reward_num_workers": "reward functions run in the training process, which watches what they return",
    "reward_processing_classes": "reward models are not supported; name functions in `trl.reward_funcs`",
}
_PAIRS = "a prompt with a chosen and a rejected answer"
# What an example consists of, in words, and the columns that it has once Axolotl has prepared it.
FORMS = {
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo"), (_PAIRS, {"prompt", "chosen", "rejected"})),
    "kto": ("a prompt with a completion and a label", {"prompt", "completion", "label"}),
    **dict.fromkeys(ONLINE, ("a prompt, and the columns that the reward functions read", {"prompt"})),
}


def rl_title(domain: str, number: int) -> str:
    """The name of an RL round in errors; `number` counts from 0, as in the YAML's list."""
    return f"rl_rounds[{number}] of domain `{domain}`"


def check_settings(entry: RLRoundArgs, where: str) -> None:
    """Raises ValueError for a key of the entry's `brainstacks:` that has no effect on a single round."""
    given = entry.brainstacks.model_fields_set
    boosting = entry.brainstacks.boosting.model_fields_set if entry.brainstacks.boosting else set()
    unused = sorted([*given & {"samples"}, *(f"boosting.{key}" for key in boosting & {"max_rounds", "min_loss_delta"})])
    if unused:
        raise ValueError(
            f"`brainstacks.{unused[0]}` of {where} has no effect: an RL round is one round, and is judged by its own "
            "objective; move it to the domain's `brainstacks:`, or leave it out"
        )


def check_rl(keys: dict[str, Any], where: str) -> None:
    """Raises ValueError if an RL round lacks datasets or reward functions of its own, or asks for unsupported settings.

    Args:
        keys: its complete config.
        where: its name in errors.
    """
    rl = keys["rl"]
    if not keys.get("datasets"):
        raise ValueError(
            f"`datasets:` is missing in {where}; give it examples of the form that `rl: {rl}` learns from ({FORMS[rl][0]})"
        )
    if rl == "kto" and int(keys.get("micro_batch_size") or 1) < 2:
        raise ValueError(
            f"`micro_batch_size` of {where} is {keys.get('micro_batch_size') or 1}; KTO compares the examples of a batch and "
            "needs 2 at least: set it in the entry"
        )
    if rl not in ONLINE:
        return
    trl = keys.get("trl") or {}
    for key, reason in REFUSED_TRL.items():
        if trl.get(key):
            raise ValueError(f"`trl.{key}` of {where} cannot be used with `adapter: brainstacks`: {reason}")
    if not trl.get("reward_funcs"):
        raise ValueError(
            f"`trl.reward_funcs` is missing in {where}; name reward functions as module.function, for example "
            "`axolotl_brainstacks.rewards.numeric_answer`"
        )
    weights = trl.get("reward_weights")
    if weights and len(weights) != len(trl["reward_funcs"]):
        raise ValueError(
            f"`trl.reward_weights` of {where} has {len(weights)} values for {len(trl['reward_funcs'])} `trl.reward_funcs`; "
            "give one for each"
        )
    if (trl.get("num_generations") or 8) < 2:
        raise ValueError(
            f"`trl.num_generations` of {where} is {trl['num_generations']}; answers to one prompt are compared with each "
            "other, so it must be at least 2"
        )


def check_rows(dataset: Dataset, rl: str, where: str) -> None:
    """Raises ValueError if the prepared examples lack a column that the trainer of `rl` reads."""
    form, columns = FORMS[rl]
    if missing := sorted(columns - set(dataset.column_names)):
        raise ValueError(
            f"The examples of `datasets:` of {where} have no `{missing[0]}`, and `rl: {rl}` learns from {form}; choose a `type:` "
            f"that makes it (the examples have {', '.join(dataset.column_names)})"
        )


def check_generations(cfg: DictDefault, processes: int, where: str) -> None:
    """Raises ValueError if an evaluation batch cannot hold all completions of a prompt.

    TRL needs the global batch to be a multiple of `num_generations`. Axolotl checks this for training only.

    Args:
        processes: the number of ranks.
    """
    generations = int((cfg.trl or {}).get("num_generations") or 8)
    size = cfg.eval_batch_size or cfg.micro_batch_size
    if (size * processes) % generations:
        raise ValueError(
            f"`eval_batch_size` of {where} is {size}, times {processes} processes, which is no multiple of "
            f"`trl.num_generations` ({generations}), and each prompt is answered so often in one batch: change one of them"
        )
