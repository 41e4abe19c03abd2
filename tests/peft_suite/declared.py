"""What PEFT's tests ask and we refuse on purpose, and what they take for granted that holds for LoRA alone.

A refusal is counted where a test failed on the very message. An assumption is counted where the named test failed as
described. Each stands here once, with its reason.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Refusal(NamedTuple):
    message: str  # a regular expression, found in the exception or in one that led to it
    reason: str


class Assumption(NamedTuple):
    test: str  # a regular expression for the test's id, file::class::name[row]
    message: str
    reason: str


REFUSALS = (
    Refusal(r"stacks cannot be merged into the base weights", "merging: a stack's gates depend on the token"),
    Refusal(r"routes rows by stack weights, not by `adapter_names`", "`adapter_names`: `use_stacks` weights rows"),
    Refusal(
        r"'BRAINSTACKS' is not compatible with the `PeftMixedModel`|BRAINSTACKS is not supported for mixed models",
        "mixed types: nothing to mix with",
    ),
    Refusal(r"scaling is only supported for models with `LoraLayer`s", "scaling: `use_stacks` weights stacks"),
    Refusal(r"cannot wrap .* is no linear layer|Only same dim for query/key/value", "layers that are not linear"),
    Refusal(r"has no attribute 'add_weighted_adapter'", "weighted sums of adapters: `use_stacks` weights stacks"),
    Refusal(r"would replace a weight of the base model", "embeddings beside a stack that is loaded to answer"),
    Refusal(r"carries Brainstacks already, of another PeftModel", "a base model that another PeftModel has wrapped"),
    Refusal(
        r"Hotswapping only supports LORA|No adapter layers found on the model, make sure call `prepare_model_for_compiled",
        "hot swap: a library's stacks come and go without it",
    ),
)
ASSUMPTIONS = (
    Assumption(r"TestScaling", r"no attribute 'scaling'", "`module.scaling`: ours is in each stack's shape"),
    Assumption(r"TestModelCard", r"issubset|None is not None", "cards: PEFT tags its own LoRA only"),
    Assumption(
        r"test_nb_params_|test_model_status_with_modules_to_save|test_model_with_injected_layers",
        r"trainable_params",
        "numbers of parameters: a stack has experts and gates",
    ),
    Assumption(r"requires_grad.*_irregular", r"lora_embedding_A", "LoRA's weights of embeddings"),
    Assumption(
        r"test_prefixes_multiple", r"assert not True", "an attribute of no adapter: the bank, of which nothing is saved"
    ),
    Assumption(
        r"test_save_pretrained_warns_for_unsharded", r"DID NOT WARN", "PEFT looks for shards in LoRA's weights only"
    ),
    Assumption(r"TestDynamicDispatch", r"'_register_custom_module'", "LoRA's registry of custom layers"),
    Assumption(
        r"TestDefaultTargetModules",
        r"Target modules .* not found",
        "no default targets: ours are those of most decoders",
    ),
    Assumption(r"TestRankAndAlphaPattern", r"no attribute 'r'", "`module.r`: ours is in each stack's shape"),
    Assumption(r"test_lora_linear_init_default", r"0\.0", "the distribution that a LoRA's A is drawn from"),
    Assumption(r"test_modules_to_save_targets_lora_layer", r"lora\.layer\.Linear", "LoRA's class in an error of PEFT"),
    Assumption(r"test_hotswap_different_peft_types", r"BRAINSTACKS and IA3", "LoRA's name in an error of PEFT"),
    Assumption(
        r"TestHotSwapping", r"holds A matrices of 8 rows|40 == 8", "a rank-r A has r rows; ours holds gates too"
    ),
    Assumption(r"TestWeightTying", r"`ensure_weight_tying` is not set", "LoRA's option `ensure_weight_tying`"),
)


def kind_of(test: str, messages: list[str]) -> tuple[str, str]:
    """How a failed test counts, "refused", "assumption" or "failed", and the reason, or for "failed" the first message."""
    for refusal in REFUSALS:
        if any(re.search(refusal.message, message) for message in messages):
            return "refused", refusal.reason
    for assumption in ASSUMPTIONS:
        if re.search(assumption.test, test) and any(re.search(assumption.message, message) for message in messages):
            return "assumption", assumption.reason
    return "failed", messages[0]
