"""What tests of the real commands share: a tiny model on disk, chat rows, a CPU config, and running ``axolotl``."""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_llama(
    folder: Path,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv: int = 2,
    seed: int = 0,
    corpus: Sequence[str] = (),
) -> Path:
    """Saves a random float32 LlamaForCausalLM with a byte-level tokenizer of 512 tokens and a ChatML template.

    Heads are 32 wide, so ``hidden``, ``32 * heads`` and ``32 * kv`` are multiples of 64 by default (bitsandbytes needs
    that on a CPU) and q_proj is not square. The tokenizer learns its merges from ``corpus``, by default from sources of
    the Python that runs, so that they differ between releases of Python.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus or [inspect.getsource(json), inspect.getsource(subprocess)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
    )
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, rng: Random) -> Path:
    """Writes ``count`` fresh chat rows (JSONL, ``type: chat_template``): reverse a word, a rule that can be learnt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(rng.choices("abcdefgh", k=rng.randint(3, 8)))
            turns = [{"role": "user", "content": f"Reverse {word}"}, {"role": "assistant", "content": word[::-1]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def base_config(model: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """An Axolotl config that trains on a CPU in float32; it lacks ``datasets`` and ``adapter`` unless overridden."""
    config: dict[str, Any] = {
        "base_model": str(model),
        "output_dir": str(output),
        "dataset_prepared_path": str(output.with_name(f"{output.name}-prepared")),
        "sequence_len": 256,
        "chat_template": "tokenizer_default",
        "lora_r": 4,
        "lora_alpha": 4,
        "lora_target_linear": True,
        # Axolotl turns its Triton kernels on by itself; they need a GPU.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataset_num_proc": 0,
        "seed": 7,
    }
    return config | overrides


def chat_dataset(path: Path) -> dict[str, Any]:
    """The entry of ``datasets`` for a JSONL file of chat rows."""
    return {"path": str(path), "ds_type": "json", "type": "chat_template"}


def cli_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: this interpreter's scripts first on PATH, no GPU, no network, no telemetry."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(extra or {}),
    }


def run_axolotl(
    args: Sequence[str | Path],
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    expect: int | None = 0,
) -> str:
    """Runs the real ``axolotl`` in a process of its own and returns what it printed, stdout and stderr together.

    ``timeout`` is in seconds; ``expect`` is the exit status to insist on, None for "any but 0".
    """
    process = subprocess.Popen(
        [Path(sys.executable).with_name("axolotl"), *args],
        cwd=cwd,
        env=cli_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what a launcher started can be killed with it
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    as_expected = process.returncode != 0 if expect is None else process.returncode == expect
    command = " ".join(map(str, args))
    assert as_expected, f"axolotl {command}: exit status {process.returncode}\n{printed[-6000:]}"
    return printed
