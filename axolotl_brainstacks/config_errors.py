"""What Pydantic finds wrong in a config, in one sentence per mistake."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: str, model: type[BaseModel], block: Any = None) -> str:
    """Describe a validation error with one sentence per mistake, each of which names the key by its path.

    Args:
        error: Pydantic's error; its dump of the input is left out.
        root: the start of each path.
        model: the schema that was validated, for "did you mean".
        block: the input. With it, a path names a domain by its name, not by its number in the list.
    """
    sentences = []
    for mistake in error.errors(include_url=False):
        path = ".".join(filter(None, [root, *map(str, _named(mistake["loc"], block))]))
        value, message = mistake["input"], mistake["msg"].removeprefix("Value error, ")
        # Only scalars are repeated in the message: a list or a mapping may fill the terminal.
        shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        match mistake["type"]:
            case "value_error" if path == root or message.startswith("brainstacks"):
                sentences.append(message)
            case "value_error":
                sentences.append(f"`{path}` is {shown}: {message}")
            case "missing":
                sentences.append(f"`{path}` is missing")
            case "extra_forbidden":
                sentences.append(f"`{path}` is not a key{_did_you_mean(model, mistake['loc'])}")
            case "model_type" | "dict_type":
                # Pydantic would name a class of ours here, which tells a user nothing.
                shown = f"the list {reprlib.repr(value)}" if isinstance(value, list) else shown
                sentences.append(f"`{path}` is {shown}: write keys below it{_such_as(model, mistake['loc'])}")
            case _:
                sentences.append(f"`{path}` is {shown}: {message}")
    return "; ".join(sentences)


def _named(path: tuple[int | str, ...], block: Any) -> Iterator[int | str]:
    """`path` through `block`, with the name of each list entry that has one in place of its number."""
    for part in path:
        try:
            block = block[part]
        except (LookupError, TypeError):
            block = None
        name = block.get("name") if isinstance(part, int) and isinstance(block, Mapping) else None
        yield name if isinstance(name, str) else part


def _did_you_mean(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """The hint for an unknown key, the last part of `path`. Only our own blocks forbid unknown keys."""
    block = _block_at(model, path[:-1])
    assert block is not None
    return nearest(str(path[-1]), block.model_fields)


def _such_as(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """The hint for a block without keys: one of those that it may have; "" if its schema is unknown."""
    if (block := _block_at(model, path)) is None:
        return ""
    fields = block.model_fields
    return f", such as `{'domains' if 'domains' in fields else next(iter(fields))}:`"


def _block_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The schema of the block at `path`, where `model` is the schema of the whole; None if no model describes it."""
    block: type[BaseModel] | None = model
    for part in path:
        if block is None:
            return None
        if isinstance(part, str):
            # In a union, `path` has the name of the alternative, too, which is no field.
            annotation = field.annotation if (field := block.model_fields.get(part)) else None
            block = next((kind for kind in (annotation, *_inner(annotation)) if _is_block(kind)), None)
    return block


def _inner(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _inner(argument)


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown key: the most similar known key, or "" if there is none."""
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean `{close[0]}`?" if close else ""
