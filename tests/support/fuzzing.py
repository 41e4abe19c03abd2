"""Hostile variants of what a library and an adapter consist of, and what becomes of each: for tests/test_fuzz.py and
benchmarks/attack.py. What is attacked is in fuzzed_files.py and fuzzed_answers.py. Everything follows from one seed."""

import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Literal

import torch
from safetensors.torch import save

Outcome = Literal["refused", "harmless", "wrong", "crash", "hang"]
SECONDS = 20
ODD: list[Any] = [
    *(None, True, False, -1, 0, 3, 3.5, 1e308, 10**30, -(10**15), "", "x" * 2000, "\x1b[2J[/b]", "../x", "/etc/passwd"),
    *("NaN", "s001_chat", "chat", [], {}, [[]], [None], {"a": 1}, {"\x1b": []}, ["chat", "chat"], "a\nb", "\u202e"),
]


@dataclass(frozen=True)
class Trial:
    """outcome, and what was done and said."""

    outcome: Outcome
    what: str


@dataclass(frozen=True)
class Attack:
    """whole: makes an honest library in a new folder. attempt: makes one variant of a copy of it, and does what a user would
    do. It raises `Wrong` for what must not be accepted; ValueError and OSError are refusals."""

    whole: Callable[[Path, Random], object]
    attempt: Callable[[Path, Random], None]


class Wrong(Exception):
    """Something was accepted that it should not have been."""


class Hang(BaseException):
    pass


# Mutations


def mutated(value: Any, rng: Random) -> Any:
    """A copy of a JSON value with one odd place."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    holder, key = rng.choice(places) if places else ([value], 0)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(["x", "\x1b[2J", "../../x", "", str(key) * 2])] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.append(holder[key])
        case 3:
            deep: Any = holder[key]
            for _ in range(rng.choice([1, 40])):
                deep = [deep]
            holder[key] = deep
        case _:
            holder[key] = rng.choice(ODD)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def odd_text(value: Any, rng: Random) -> bytes:
    """JSON with an odd place, or something that is hardly JSON."""
    data = json.dumps(value if rng.random() < 0.2 else mutated(value, rng)).encode()
    match rng.randrange(10):
        case 0:
            return data[: rng.randrange(len(data) + 1)]
        case 1:
            return b"[" * 10**5 + data
        case 2:
            return data.replace(b"0", rng.choice([b"NaN", b"1e999", b"9" * 5000, b"-Infinity"]), 1)
        case 3:
            return b'{"a": 1, "a": 2, ' + data[1:]
        case 4:
            return damaged(data, rng)
    return data


def damaged(data: bytes, rng: Random) -> bytes:
    """Some bytes altered, gone or too many."""
    data = bytearray(data)
    place = rng.randrange(len(data)) if data else 0
    match rng.randrange(4):
        case 0:
            return bytes(data[:place])
        case 1:
            return bytes(data[:place]) + rng.randbytes(rng.randrange(1, 20)) + bytes(data[place:])
        case 2:
            place = rng.randrange(min(len(data), 100) or 1)  # the header of a safetensors file
    for _ in range(rng.randrange(1, 4)):
        if data:
            data[(place + rng.randrange(3)) % len(data)] = rng.randrange(256)
    return bytes(data)


def odd_tensors(tensors: dict[str, torch.Tensor], rng: Random) -> bytes:
    """A safetensors file with an odd tensor, or a damaged one."""
    tensors = dict(tensors)
    key = rng.choice(list(tensors))
    whole = tensors[key]
    tensors[rng.choice([key, key, key, key + "x", "\x1b[2J"])] = rng.choice(
        [
            *(
                whole.reshape(-1)[:0].contiguous(),
                whole.reshape(-1).contiguous(),
                whole.reshape(1, -1).contiguous(),
                whole.double(),
            ),
            *(
                whole.to(torch.int64),
                whole.bool(),
                torch.full_like(whole, 7),
                torch.zeros_like(whole),
                -whole.abs() - 1,
            ),
            *(whole.to(torch.float8_e4m3fn), whole.to(torch.complex64), torch.tensor(1.0), whole.float() / 0),
        ]
    )
    if rng.random() < 0.2:
        del tensors[key]
    data = save({name: tensor.clone() for name, tensor in tensors.items()})  # of memory of its own
    return damaged(data, rng) if rng.random() < 0.3 else data


def trials(name: str, attack: Attack, count: int, seed: int) -> Iterator[Trial]:
    """What becomes of `count` variants."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        attack.whole(whole, Random(seed))
        for number in range(count):
            rng, folder = Random(f"{seed} {name} {number}"), Path(temporary) / str(number) / "library"
            shutil.copytree(whole, folder)
            yield _tried(attack, folder, rng, f"{name} {number} of seed {seed}")
            shutil.rmtree(folder.parent)


def _tried(attack: Attack, folder: Path, rng: Random, title: str) -> Trial:
    try:
        with _limited(SECONDS):
            attack.attempt(folder, rng)
        return Trial("harmless", title)
    except (ValueError, OSError) as error:
        clear = all(line.isprintable() for line in str(error).splitlines())
        return Trial("refused" if clear else "crash", f"{title}: {type(error).__name__}: {error!s:.300}")
    except Wrong as error:
        return Trial("wrong", f"{title}: {error}")
    except Hang:
        return Trial("hang", title)
    except Exception as error:
        return Trial("crash", f"{title}: {type(error).__name__}: {error!s:.300}")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def put(folder: Path, file: str, content: bytes) -> None:
    """Put a file into a library as its author would, with its true hash in the manifest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    old, new = sha256_of(folder / file), hashlib.sha256(content).hexdigest()

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("sha256") == old:
                return {"sha256": new, "bytes": len(content)}
            return {key: change(item) for key, item in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    path.write_text(json.dumps(change(data)))
    (folder / file).write_bytes(content)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
