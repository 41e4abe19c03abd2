"""What PEFT's tests are run on: a config of ours that they can build, and the rows of their tables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from peft import TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from axolotl_brainstacks.adapter import BrainstacksConfig as OurConfig
from axolotl_brainstacks.adapter import BrainstacksLinear


@dataclass
class BrainstacksConfig(OurConfig):
    """Ours, and PEFT's convention `init_weights`: False for a stack that is not the identity, as if it were trained."""

    init_weights: bool = field(default=True)


class _NotTheIdentity(BrainstacksLinear):
    """A layer whose stacks heed `init_weights`."""

    def update_layer(self, adapter_name: str, config: OurConfig) -> None:
        BrainstacksLinear_update_layer(self, adapter_name, config)
        a, b = (side.weight for side in self.trained(adapter_name))
        if not getattr(config, "init_weights", True) and not a.is_meta:
            with torch.no_grad():
                a[: 2 * config.num_experts].normal_(std=0.3)
                b.normal_(std=0.3)


BrainstacksLinear_update_layer = BrainstacksLinear.update_layer


def install() -> None:
    """Let PEFT load our test config, and our layers heed it."""
    PEFT_TYPE_TO_CONFIG_MAPPING["BRAINSTACKS"] = BrainstacksConfig  # type: ignore[index]
    BrainstacksLinear.update_layer = _NotTheIdentity.update_layer  # type: ignore[method-assign]


# LoRA's defaults for the models of the tests; ours name the projections of decoders only.
DEFAULT_TARGETS = ["q_proj", "v_proj", "query", "value", "q", "v", "c_attn", "query_key_value"]


class LoraStandIn(BrainstacksConfig):
    """Takes the place of `LoraConfig` in tests that would do with any tuner.

    `created` counts: a test that creates none says nothing about us.
    """

    created = 0

    def __init__(self, *args: Any, **settings: Any) -> None:
        LoraStandIn.created += 1
        names = [part.name for part in fields(BrainstacksConfig)]
        if "init_lora_weights" in settings:
            settings["init_weights"] = settings.pop("init_lora_weights")
        settings = {
            name: value for name, value in settings.items() if value not in (None, "none", False, {}) or name in names
        }
        self.foreign = sorted(set(settings) - set(names))
        if not isinstance(settings.get("init_weights", True), bool):
            self.foreign.append(f"init_lora_weights={settings.pop('init_weights')}")
        # Noise would make two forwards in training mode differ, where a LoRA's are alike.
        settings = {"noisy_gate": False} | settings
        if settings.get("target_modules") is None:
            settings["target_modules"] = list(DEFAULT_TARGETS)
        super().__init__(*args, **{name: value for name, value in settings.items() if name in names})
        if self.foreign and not collecting:
            skip_foreign(self)


collecting = True  # while pytest imports the test files, where nothing can be skipped


def skip_foreign(config: LoraStandIn) -> None:
    pytest.skip(f"about LoRA alone: {', '.join(config.foreign)}")


def is_ours(value: object) -> bool:
    """Whether a parameter of a test is a row of ours."""
    if isinstance(value, type):
        return issubclass(value, BrainstacksConfig)
    if isinstance(value, tuple | list):
        return any(is_ours(item) for item in value)
    return isinstance(value, BrainstacksConfig)


def rows(task: str | None, **settings: Any) -> list[tuple[type, dict[str, Any]]]:
    return [(BrainstacksConfig, {"task_type": task, "r": 2, "target_modules": "all-linear"} | settings)]


DECODER = [*rows("CAUSAL_LM"), *rows("CAUSAL_LM", num_experts=2, top_k=1, lora_dropout=0.05, noisy_gate=False)]
ENCODER_DECODER = rows("SEQ_2_SEQ_LM")
# Not "all-linear": no output depends on the pooler's linear layer.
FEATURES = rows("FEATURE_EXTRACTION", target_modules=["query", "value", "query_proj", "value_proj", "in_proj"])
SEQUENCE_CLASSES = rows("SEQ_CLS")
# PEFT wraps the heads of these with "all-linear", and then cannot save them; LoRA fails alike.
TOKEN_CLASSES = rows("TOKEN_CLS", target_modules=["query", "value"])
QUESTIONS = rows("QUESTION_ANS", target_modules=["query", "value"])
CONFIGS = ((BrainstacksConfig, {}),)
LAYERED_CONFIGS = list(CONFIGS)
COMPILED = {
    "brainstacks": (BrainstacksConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], r=2), {})
}
CUSTOM = [
    (f"{model} {number} Brainstacks", model, BrainstacksConfig, settings)
    for number, (model, settings) in enumerate(
        [
            ("MLP", {"target_modules": "lin0"}),
            ("MLP", {"target_modules": ["lin0"]}),
            ("MLP", {"target_modules": ["lin1"], "noisy_gate": False}),
            ("MLP", {"target_modules": ["lin0", "lin1"], "num_experts": 2, "top_k": 1}),
            ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
            ("MLP2", {"target_modules": ["lin0", "lin2"], "use_rslora": False}),
            ("EmbConv1D", {"target_modules": ["conv1d"]}),
            ("MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], "r": 3}),
        ],
        start=1,
    )
]
CUSTOM_CLASSES = [BrainstacksConfig]
TWO_ADAPTERS = [
    (
        f"Brainstacks {name}",
        "stacks",
        BrainstacksConfig,
        {"target_modules": [first], "init_weights": False},
        {"target_modules": [second], "init_weights": False},
    )
    for name, first, second in (("Same", "lin0", "lin0"), ("Different", "lin0", "lin1"))
]

# File of PEFT's tests -> name there -> our rows.
TABLES: dict[str, dict[str, str]] = {
    "test_config.py": {"ALL_CONFIG_CLASSES": "CONFIGS", "LAYER_INDEXING_CONFIG_CLASSES": "LAYERED_CONFIGS"},
    "test_custom_models.py": {
        "TEST_CASES": "CUSTOM",
        "ALL_PEFT_CONFIG_CLASSES": "CUSTOM_CLASSES",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "TWO_ADAPTERS",
    },
    "test_decoder_models.py": {"ALL_CONFIGS": "DECODER"},
    "test_encoder_decoder_models.py": {"ALL_CONFIGS": "ENCODER_DECODER"},
    "test_feature_extraction_models.py": {"ALL_CONFIGS": "FEATURES"},
    "test_seq_classifier.py": {"ALL_CONFIGS": "SEQUENCE_CLASSES"},
    "test_torch_compile.py": {"SETTINGS": "COMPILED"},
    "test_token_classification_qa.py": {"TOKEN_CLS_CONFIGS": "TOKEN_CLASSES", "QA_CONFIGS": "QUESTIONS"},
}
# Files with tests that have no table: our names take the place of LoRA's.
STAND_IN = (
    "test_custom_models.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_other.py",
    "test_tuners_utils.py",
)
# What LoRA's names in these files become; and in one of them, layers that stacks do not wrap.
TRANSLATIONS = {
    "lora_A": "brainstacks_A",
    "lora_B": "brainstacks_B",
    '"lora_"': '"brainstacks_"',
    '"lora"': '"brainstacks"',
    '"lora.Linear"': '"BrainstacksLinear"',
    '"LoraModel"': '"BrainstacksModel"',
    '"LORA"': '"BRAINSTACKS"',
}
ALSO = {
    "test_tuners_utils.py": {
        "nn.Conv2d(3, 10, 3)": "nn.Linear(10, 10)",
        "nn.Embedding(10, 10)": "nn.Linear(10, 10)",
        '"lora.Conv2d"': '"BrainstacksLinear"',
        '"lora.Embedding"': '"BrainstacksLinear"',
    }
}
