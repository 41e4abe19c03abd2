"""What Pydantic finds wrong in a config, in one sentence per mistake."""

from __future__ import annotations

import difflib
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
    for part in path[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(kind for kind in (annotation, *_inner(annotation)) if _is_block(kind))
    return nearest(str(path[-1]), model.model_fields)


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
