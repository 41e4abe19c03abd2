"""The documents say what is so: generated pages, YAML, Python and shell blocks, links, names of files and keys."""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import yaml
from axolotl.cli.main import cli as axolotl
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel
from support.answering import random_router
from support.documents import PAGES, REPO, anchors, blocks, each_block, inline_code, links, prose, title
from support.models import base_config
from support.routed import new_library
from transformers import AutoModelForCausalLM

from axolotl_brainstacks import cli
from axolotl_brainstacks.args import BrainstacksBlock, DomainArgs, DomainSettings, RLRoundArgs
from axolotl_brainstacks.curriculum.overlay import check_overlay
from axolotl_brainstacks.curriculum.plan import Plan
from axolotl_brainstacks.curriculum.stages import load_domains

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
RL = REPO / "docs/rl.md"
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=title)
OURS = {"brainstacks-router": cli.router, "brainstacks-library": cli.library}


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """`docs/generate.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generate_docs", REPO / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Generated pages


def test_the_generated_pages_are_up_to_date(generate: ModuleType) -> None:
    assert generate.outdated() == [], "run `python docs/generate.py`"


def documented_keys() -> dict[str, tuple[str, str]]:
    """Default and meaning of every key in `docs/config.md`; a key of a domain follows the one of `brainstacks:`."""
    page = (REPO / "docs/config.md").read_text()
    return {
        f"{section.partition(chr(10))[0]} {key}": (default, meaning)
        for section in page.split("\n## ")
        for key, default, meaning in re.findall(
            r"^\| `([\w.]+)` \|[^|]*\| ([^|]*) ?\| ([^|]*) \|$", section, re.MULTILINE
        )
    }


def expected_keys() -> Iterator[tuple[str, Any]]:
    """Where each key has to be in `docs/config.md`, and its field."""
    sections = {
        "`brainstacks:`": BrainstacksBlock,
        "An entry of `domains:`": DomainArgs,
        "`brainstacks:` inside an entry of `domains:`": DomainSettings,
        "An entry of `rl_rounds:`": RLRoundArgs,
    }
    for section, model in sections.items():
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if model is BrainstacksBlock and isinstance(default, BaseModel):
                for key, inner in type(default).model_fields.items():
                    yield f"`brainstacks.{name}:` {name}.{key}", inner
            else:
                yield f"{section} {name}", field


def test_the_reference_has_every_key_with_default_and_meaning() -> None:
    documented, expected = documented_keys(), dict(expected_keys())
    assert documented.keys() == expected.keys()
    assert len(documented) > 55
    for key, field in expected.items():
        shown, meaning = documented[key]
        default = field.get_default(call_default_factory=True)
        assert meaning.strip(), f"`{key}` has no description"
        if field.is_required():
            assert shown == "required "
        elif default is None or isinstance(default, BaseModel):
            assert not shown.strip(), key
        else:
            value = yaml.safe_load(shown.strip(" `"))
            assert (tuple(value) if isinstance(default, tuple) else value) == default, key


def test_every_command_and_option_is_described() -> None:
    page = (REPO / "docs/commands.md").read_text()
    for name, command in cli.library.commands.items():
        section = page.partition(f"### `axolotl brainstacks-library LIB {name}`")[2].partition("\n#")[0]
        assert command.help and command.help.split(".")[0].split()[0] in section
        for param in command.params:
            assert param.human_readable_name.upper() in section or param.opts[0] in section, (name, param.name)


# Blocks


@pytest.mark.parametrize("text", each_block("yaml"))
def test_yaml_is_what_the_plugin_accepts(text: str) -> None:
    parsed = yaml.safe_load(text)
    if isinstance(parsed, dict):
        assert set(parsed) - {"brainstacks"} <= set(AxolotlInputConfig.model_fields)
    block = {"domains": parsed} if isinstance(parsed, list) else parsed["brainstacks"]
    accepted = BrainstacksBlock.parse(block)
    accepted.check_names([])
    for domain in accepted.curriculum:
        check_overlay(domain)


def test_example_rows_are_what_their_rounds_load(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The config and the rows of `docs/rl.md`, and a supervised row of `docs/training.md`."""
    (text,) = (text for page, text in blocks("yaml") if title(page) == "docs/rl.md")
    rows = dict(re.findall(r"`(\w+\.jsonl)`.*?\n\n```json\n(.*?)\n```", RL.read_text(), re.DOTALL))
    (rows["sums.jsonl"],) = (row for page, row in blocks("json") if title(page) == "docs/training.md")
    (domain,) = yaml.safe_load(text)
    for entries in (domain["datasets"], *(entry["datasets"] for entry in domain["rl_rounds"])):
        for entry in entries:
            file = tmp_path / entry["path"]
            file.write_text((rows.pop(entry["path"]).strip() + "\n") * 12)
            entry["path"] = str(file)
    assert not rows, "rows of files that no entry names"
    for keys in (domain, *domain["rl_rounds"]):
        keys |= {
            "val_set_size": 4,
            "micro_batch_size": 4,
            "eval_batch_size": 8,
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
        }
    config = base_config(tiny_llama_dir, tmp_path / "out", adapter="brainstacks", brainstacks={"domains": [domain]})
    plan = Plan.prepare(DictDefault(config))
    (stage,) = load_domains(plan.raw, plan.block.curriculum, plan.block, with_rl=True, training=True)
    assert [rl_round.rl for rl_round in stage.rl_rounds] == ["dpo", "kto", "grpo"]
    assert all(len(part.train_dataset) and len(part.eval_dataset) for part in (stage, *stage.rl_rounds))


def test_there_are_blocks_of_every_kind() -> None:
    for language, least in {"yaml": 4, "python": 3, "bash": 5, "text": 6, "mermaid": 3}.items():
        assert len(list(blocks(language))) >= least, language
    assert sum("base_model:" in text for _, text in blocks("yaml")) >= 2, "complete configs: see test_configs.py"


@pytest.fixture(scope="module")
def folder_with_library(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `library`, whose domains are the demo's and whose stacks are random."""
    torch.manual_seed(0)
    folder, domains = tmp_path_factory.mktemp("docs"), ["chat", "math", "medical"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    library = new_library(folder / "library", base, domains)
    random_router(domains, features=base.config.hidden_size, seed=0).save(library)
    return folder


def run_python(text: str, model_dir: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block with a tiny model in place of the one that it names. Returns its names."""
    exec(
        compile(re.sub(r'^name = ".*"$', f"name = {str(model_dir)!r}", text, flags=re.MULTILINE), "block", "exec"),
        names,
    )
    return names


@pytest.mark.parametrize("text", each_block("python"))
def test_python_runs(
    text: str, folder_with_library: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_with_library)
    names: dict[str, Any] = {}
    if not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(text).body):
        # It goes on where the README's block has loaded a model.
        first = next(block for page, block in blocks("python") if page.name == "README.md")
        names = run_python(first.partition("\n\nchat")[0], tiny_llama_dir, names)
    torch.manual_seed(0)
    names = run_python(text, tiny_llama_dir, names)
    assert type(names["model"].base_model).__name__ == "BrainstacksModel"


# Commands


def commands() -> Iterator[tuple[str, str]]:
    """Page and line of every command: in shell blocks, and in lines of text whose first word is a program of ours."""
    for page, text in blocks("bash"):
        for line in text.splitlines():
            if command := line.partition(" #")[0].strip():
                yield title(page), command
    for page in PAGES:
        for code in inline_code(page):
            if re.match(r"(axolotl|brainstacks-library|make|pip|python) ", code):
                yield title(page), code


COMMANDS = sorted(set(commands()))


def check_click(command: click.Command, words: list[str]) -> None:
    """Fails for an option, or a subcommand, that the click command `command` does not have."""
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    words = words[: words.index("--")] if "--" in words else words
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, sorted(known)


def check_axolotl(words: list[str]) -> None:
    name, *rest = words
    if name == "brainstacks-library":
        if rest[1:] and rest[1] != "COMMAND":
            check_click(cli.library.commands[rest[1]], rest[2:])
    else:
        check_click(OURS[name] if name in OURS else axolotl.commands[name], rest)


def check_python(words: list[str]) -> None:
    """Fails for a script, or its options, or a module that is not there."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
        return
    script = (REPO / words[0]).read_text()
    if "measure import" in script and re.search(r"import .*\bmain\b", script):
        script += (REPO / "benchmarks/measure.py").read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in script, option


def check_make(words: list[str], page: str) -> None:
    makefile = (REPO / "Makefile").read_text()
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_commands_exist_with_their_options(page: str, line: str) -> None:
    for part in line.split("&&"):
        program, *words = shlex.split(part.strip().removeprefix("sudo ").removeprefix("OMP_NUM_THREADS=1 "))
        match program.removeprefix(".venv/bin/"):
            case "axolotl":
                check_axolotl(words)
            case "brainstacks-library":
                assert "brainstacks-library" in PROJECT["scripts"]
                check_axolotl(["brainstacks-library", *words])
            case "python":
                check_python(words)
            case "make":
                check_make(words, page)
            case "pip":
                extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
                assert words[0] == "install" and set(extras) <= set(PROJECT["optional-dependencies"])
            case "deepspeed":
                assert importlib.util.find_spec(words[words.index("--module") + 1]) is not None
            case other:
                assert other == "pre-commit" and (REPO / ".pre-commit-config.yaml").exists(), other


# Names


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@EVERY_PAGE
def test_files_that_are_named_exist(page: Path) -> None:
    for code in inline_code(page):
        if re.fullmatch(r"(axolotl_brainstacks|tests|benchmarks|docs|example_configs)/[\w./-]*", code):
            assert (REPO / code).exists(), code


@EVERY_PAGE
def test_modules_and_functions_that_are_named_exist(page: Path) -> None:
    for dotted in re.findall(r"\baxolotl_brainstacks(?:\.[a-z_]\w*)+", page.read_text()):
        module = dotted
        while not has_module(module):
            module = module.rpartition(".")[0]
        found: Any = importlib.import_module(module) if module != dotted else None
        for part in dotted.removeprefix(module).split(".")[1:]:
            found = getattr(found, part)


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


@EVERY_PAGE
def test_keys_that_are_named_exist(page: Path) -> None:
    nested = {
        name: type(default).model_fields
        for name, field in BrainstacksBlock.model_fields.items()
        if isinstance(default := field.get_default(call_default_factory=True), BaseModel)
    }
    for code in inline_code(page):
        if match := re.fullmatch(r"(?:brainstacks\.)?(\w+)\.(\w+)(?::.*)?", code):
            block, key = match.groups()
            assert block not in nested or key in {*nested[block], "py"}, code
        if match := re.fullmatch(r"brainstacks\.(\w+)(?::.*)?", code):
            assert match[1] in BrainstacksBlock.model_fields, code


# The rest


def test_the_readme_is_short() -> None:
    assert 850 <= len((REPO / "README.md").read_text().split()) <= 1000


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [REPO / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            todo += [page.parent / link.partition("#")[0] for link in links(page) if not link.startswith("http")]
    assert {page.resolve() for page in PAGES} <= reached


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert str(yaml.safe_load((REPO / "CITATION.cff").read_text())["version"]) == version
    assert f"version {version}" in prose(REPO / "README.md")
    assert re.search(rf"^## \[.*\b{re.escape(version)}\b", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    linted = [line.strip().replace("$(VENV)", ".venv") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == linted
