"""The models that benchmarks run: random weights in real shapes, alone, with a LoRA, with stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from measure import DEVICE, ON_GPU, autocast
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from axolotl_brainstacks.adapter import BrainstacksConfig
from axolotl_brainstacks.names import FrozenDtype
from axolotl_brainstacks.serving.model import BrainstacksModel

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK, TOP_K = 4, 16, 2
ROWS, TOKENS = 4, 128
SMOLLM2_SIZES = {"model": "SmolLM2-135M shapes", "rows": ROWS, "tokens": TOKENS, "stack": "4 experts x r 16, top 2"}


def smollm2() -> PreTrainedModel:
    """SmolLM2-135M, but random."""
    return ready(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    )


def gemma3_12b_layer() -> PreTrainedModel:
    """One decoder layer of Gemma 3 12B, random, between an embedding and a head of next to no size."""
    return ready(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=256,
                hidden_size=3840,
                intermediate_size=15360,
                num_hidden_layers=1,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=256,
            )
        )
    )


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """As Axolotl would train it here: on a GPU NF4 with gradient checkpointing, on a CPU as it is."""
    model.requires_grad_(False)
    # The layers stand for ones inside a model: gradients have to reach their inputs.
    model.enable_input_require_grads()
    if ON_GPU:
        to_nf4(model)
        model.to(DEVICE)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def to_nf4(model: PreTrainedModel) -> None:
    """Make every linear layer of the decoder a 4-bit one; it is quantised when it is moved to its device."""
    import bitsandbytes as bnb

    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                linear.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, linear)
    model.is_loaded_in_4bit = True


def another[M: nn.Module](model: M) -> M:
    """A copy that shares the weights, so that all variants read the same memory."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def with_lora(base: PreTrainedModel, targets: list[str] = PROJECTIONS) -> PeftModel:
    """PEFT's LoRA with the ranks of a whole stack."""
    rank = EXPERTS * RANK
    return get_peft_model(
        another(base), LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=targets)
    )


def with_stacks(base: PreTrainedModel, frozen: int = 0, frozen_dtype: FrozenDtype = None) -> PeftModel:
    """A fresh stack in training on top of `frozen` random ones."""
    config = BrainstacksConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, num_experts=EXPERTS, top_k=TOP_K, target_modules=PROJECTIONS
    )
    model = get_peft_model(another(base), config)
    tuner_of(model).set_frozen_dtype(frozen_dtype)
    for _ in range(frozen):
        attach_random(model)
    return model


def attach_random(model: PeftModel) -> None:
    """One more random frozen stack."""
    tuner, config = tuner_of(model), model.peft_config["default"]
    assert isinstance(config, BrainstacksConfig)
    tuner.attach_stack(stack_name(len(tuner.stacks)), "any", config, random_stack(tuner))


def stack_name(number: int) -> str:
    return f"s{number + 1:03d}_any"


def random_stack(tuner: BrainstacksModel, scale: float = 0.001) -> dict[str, Tensor]:
    """Tensors of a living stack. At the default scale of B it changes little: activations stay in a trained model's range."""
    return {
        key: torch.randn_like(tensor) * (0.02 if key.endswith("A.weight") else scale)
        for key, tensor in tuner.export_stack("default").items()
    }


def tuner_of(model: PeftModel) -> BrainstacksModel:
    assert isinstance(model.base_model, BrainstacksModel)
    return model.base_model


def use_first(model: PeftModel, stacks: int) -> None:
    """Switch on the first `stacks` frozen stacks."""
    tuner_of(model).use_stacks([stack_name(number) for number in range(stacks)])


def random_ids(model: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), device=DEVICE)  # type: ignore[arg-type,union-attr]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    with autocast():
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def training_step(
    model: nn.Module, rows: int = ROWS, tokens: int = TOKENS, extra_loss: Callable[[], Tensor] | None = None
) -> Callable[[], None]:
    """Forward, backward and optimiser step on one random batch, as a function."""
    ids = random_ids(model, rows, tokens)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-5, fused=True)  # what Axolotl takes by default
    model.train()

    def step() -> None:
        loss = loss_of(model, ids)
        if extra_loss is not None:
            loss = loss + extra_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def trainable_size(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(weight.numel() for weight in trainable(model))
