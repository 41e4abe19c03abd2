"""Writes the pages of this folder that the code itself determines: `config.md` and `commands.md`.

    python docs/generate.py            writes them
    python docs/generate.py --check    exit status 1 when a page differs from what the code says

`tests/test_docs.py` runs the same comparison.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from axolotl_brainstacks import cli
from axolotl_brainstacks.args import BrainstacksBlock, DomainArgs, DomainSettings, RLRoundArgs, StageSettings

FOLDER = Path(__file__).parent
NOTE = "<!-- `python docs/generate.py` writes this page; do not edit it by hand. -->"
HEAD = "| key | type | default | meaning |\n| --- | --- | --- | --- |"
# Bounds of a number as pydantic keeps them, and as they are written.
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


# The `brainstacks:` block


def config_page() -> str:
    """All keys of `brainstacks:`, from the models that validate it."""
    parts = [
        NOTE,
        "# The `brainstacks:` block",
        "All other keys of the YAML are Axolotl's own and keep their meaning: `lora_r` is the rank of each expert, "
        "`lora_alpha` and `lora_dropout` hold for each stack, `lora_target_modules` names the projections. An expert's "
        "output is scaled by `s = alpha / sqrt(r)` (rsLoRA), of `lora_alpha` and `lora_r`, not by `alpha / r`: with both at 16, "
        "`s` is 4. A key that is not listed here is an error that names the nearest key.",
        "How the parts work together: [how it works](how-it-works.md). Complete configs: "
        "[`example_configs/`](../example_configs).",
        "## `brainstacks:`",
        _table(BrainstacksBlock),
    ]
    for name, field in BrainstacksBlock.model_fields.items():
        if _is_block(field.annotation):
            parts += [f"## `brainstacks.{name}:`", _summary(field.annotation), _table(field.annotation, f"{name}.")]
    parts += [
        "## An entry of `domains:`",
        _summary(DomainArgs),
        _table(DomainArgs),
        "## `brainstacks:` inside an entry of `domains:`",
        _summary(StageSettings),
        _table(DomainSettings),
        "## An entry of `rl_rounds:`",
        _summary(RLRoundArgs),
        _table(RLRoundArgs),
        "`brainstacks:` inside it takes the keys of a domain's, except `eval_rows` and `router_datasets`. "
        "Examples: [rounds of preference and reinforcement learning](rl.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(model: Any) -> str:
    return inspect.cleandoc(model.__doc__).replace("\n", " ")


def _table(model: Any, prefix: str = "") -> str:
    return "\n".join([HEAD, *_rows(model, prefix)])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A row per key of `model`; a key that is a block of its own has its section, or is described as one."""
    for name, field in model.model_fields.items():
        if model is BrainstacksBlock and _is_block(field.annotation):
            continue
        default = field.get_default(call_default_factory=True)
        block = _is_block(_without_none(field.annotation))
        shown = "required" if field.is_required() else "" if default is None or block else f"`{_yaml(default)}`"
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_kind(field)} | {shown} | {meaning} |"


def _yaml(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation


def _kind(field: FieldInfo) -> str:
    """The type of a key as a user of YAML calls it, with its bounds."""
    bounds = [f"{sign} {bound:g}" for rule in field.metadata for key, sign in BOUNDS.items()
              if (bound := getattr(rule, key, None)) is not None]  # fmt: skip
    return ", ".join([_name(_without_none(field.annotation)), *bounds])


def _name(kind: Any) -> str:
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if kind in names:
        return names[kind]
    if _is_block(kind):
        return "block"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return {str: "list of names", RLRoundArgs: "list of rounds", DomainArgs: "list of domains"}.get(
            arguments[0], "list of datasets"
        )
    if origin is dict:
        return "number by domain"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    raise AssertionError(f"no name for {kind}")


# The commands


def commands_page() -> str:
    """The help of every command that the package adds to Axolotl."""
    lines = [
        NOTE,
        "# Commands",
        "The package adds two commands to `axolotl`. `brainstacks-library` needs no Axolotl and is installed as a program "
        "of its own, too: `brainstacks-library LIB list` is the same as `axolotl brainstacks-library LIB list`. Axolotl's "
        "own commands (`preprocess`, `train`, `inference`) are described in [training](training.md) and "
        "[answering](answering.md).",
        "A mistake of the user ends a command with one line on stderr and exit status 1.",
        *_command(cli.router, "axolotl brainstacks-router", 2),
        *_command(cli.library, "axolotl brainstacks-library", 2),
    ]
    return "\n\n".join(lines) + "\n"


def _command(command: click.Command, path: str, depth: int) -> Iterator[str]:
    """Heading, usage, help and options of a command, then those of its subcommands."""
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    usage = " ".join([path, *(argument.name.upper() for argument in arguments if argument.name)])
    subcommands = command.commands if isinstance(command, click.Group) else {}
    tail = " COMMAND" if subcommands else " [OPTIONS]" if options else ""
    yield f"{'#' * depth} `{path}`"
    yield f"```text\n{usage}{tail}\n```"
    yield inspect.cleandoc(command.help or "")
    if options:
        yield "\n".join(["| option | meaning |", "| --- | --- |", *map(_option, options)])
    for name in sorted(subcommands):
        yield from _command(subcommands[name], f"{usage} {name}", depth + 1)


def _option(option: click.Option) -> str:
    kind = option.type
    value = "" if option.is_flag else option.metavar or (
        "\\|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else "TEXT"
    )  # fmt: skip
    default = f" Default: `{option.default}`." if option.show_default else ""
    return f"| `{', '.join(option.opts)}`{f' {value}' if value else ''} | {option.help or ''}{default} |"


PAGES = {"config.md": config_page, "commands.md": commands_page}


def outdated() -> list[str]:
    """The generated pages that differ from what the code says."""
    return [name for name, page in PAGES.items() if (FOLDER / name).read_text() != page()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        if pages := outdated():
            sys.exit(f"Outdated: {', '.join(pages)}; run `python docs/generate.py`")
    else:
        for name, page in PAGES.items():
            (FOLDER / name).write_text(page())
