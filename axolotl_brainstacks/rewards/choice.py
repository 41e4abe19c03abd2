"""A reward for completions that choose the right one of several options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from axolotl_brainstacks.rewards.text import Completion, column, marked_answers, text_of

# Punctuation, except inside a number (1,000 or 0.5) and a sign before one.
_PUNCTUATION = re.compile(r"(?<!\d)[^\w\s-]|[^\w\s](?!\d)|_")
_REASON = r"\b(?:because|since|as|but)\b"
_CLAUSE_END = re.compile(rf"[\n;}}]|\.\s|{_REASON}")
_NEGATION = re.compile(r"\b(?:not|neither|nor|cannot|isn t|aren t)\b", re.IGNORECASE)
_VERDICTS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Options:
    """The choices of an example.

    letters: the letters that name the choices, or "" if they have none.
    texts: the name of each choice by its text, without punctuation.
    """

    letters: str
    texts: dict[str, str]

    def named_in(self, clause: str) -> tuple[set[str], bool]:
        """The names of the choices that `clause` mentions, and whether the rest of it has a negation ("not B").

        If the text of one choice is part of another's, the longest match counts: "no change", not "no".
        """
        found, rest = set(), _squeezed(clause)
        for text in sorted(self.texts, key=len, reverse=True):
            mention = re.compile(rf"(?<!\S){re.escape(text)}(?!\S)", re.IGNORECASE)
            if mention.search(rest):
                found.add(self.texts[text])
                rest = mention.sub("|", rest)
        if self.letters:
            found |= self._letters_in(clause, rest)
        return found, _NEGATION.search(rest) is not None

    def _letters_in(self, clause: str, squeezed: str) -> set[str]:
        upper, lower = f"[{self.letters}]", f"[{self.letters.lower()}]"
        if re.fullmatch(lower, squeezed):
            return {squeezed.upper()}
        found = set()
        for match in re.finditer(rf"(?<!\S){upper}(?!\S)", squeezed):
            # A and I are also words ("A dog", "I think"). They count as letters only if what follows speaks of a letter.
            names_choice = re.match(r"\s(?:is|was|or|and|seems|must)\b|\s[^a-z]|$", squeezed[match.end() :])
            if match[0] not in "AI" or names_choice:
                found.add(match[0])
        return found | {letter.upper() for letter in re.findall(rf"(?:^|[\s(])({lower})[).:](?=\W|$)", clause)}


def exact_choice(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    r"""Return 1.0 if the completion chooses the option in the column ``answer``, else 0.0.

    The optional column ``choices`` lists the options' texts, which the letters A, B, C, ... also name, in this order. Without
    it the options are yes, no and maybe, or the letters A to E, depending on ``answer``. ``answer`` is a text, a letter, or a
    whole number, the position from 0 among the texts. Case and punctuation do not matter.

    The function looks for an option after the completion's last ``####``, ``\boxed{`` or "answer is", then in its last line,
    then in all of it. A part that mentions two options, or negates one, chooses none.

    Args:
        prompts: not used.
        completions: the completions to score.
        columns: the data's columns, with one entry per completion.

    Returns:
        One reward per completion; None if there are no ``choices`` and ``answer`` is not an option.

    Raises:
        ValueError: if the data have no column ``answer``, or ``answer`` is not among ``choices``.
    """
    answers = column(columns, "answer", "exact_choice")
    choices = columns.get("choices") or [None] * len(answers)
    return [_reward(*row) for row in zip(completions, answers, choices, strict=True)]


def _reward(completion: Completion, answer: Any, choices: Any) -> float | None:
    if answer is None:
        return None
    read = _of_choices(answer, choices) if choices else _of_kind(answer)
    if read is None:
        return None
    options, wanted = read
    return float(_settled(text_of(completion), options) == wanted)


def _of_choices(answer: Any, choices: Any) -> tuple[Options, str]:
    """The options in the column `choices`, and the name of the right one."""
    if not isinstance(choices, list) or len(choices) > len(ascii_uppercase):
        raise ValueError(f"the column `choices` holds {choices!r:.200}; it must be a list of at most 26 texts")
    exact = [str(choice) for choice in choices]
    spelled = [_squeezed(text).casefold() for text in exact]
    if all(len(text) == 1 and text.upper() in ascii_uppercase for text in spelled):
        names = [text.upper() for text in spelled]
        options = Options("".join(names), {})
    else:
        names = list(ascii_uppercase[: len(choices)])
        # Texts that differ only in punctuation (C, C++) can be chosen by their letters only.
        texts = {text: name for text, name in zip(spelled, names, strict=True) if text and spelled.count(text) == 1}
        options = Options("".join(names), texts)
    plain = _squeezed(str(answer)).casefold()
    if isinstance(answer, int) and all(isinstance(choice, str) for choice in choices):
        if 0 <= answer < len(names):
            return options, names[answer]
    elif str(answer) in exact:
        return options, names[exact.index(str(answer))]
    elif plain in options.texts:
        return options, options.texts[plain]
    elif plain.upper() in names:
        return options, plain.upper()
    raise ValueError(
        f"the column `answer` holds {answer!r}, which is none of the example's `choices`, {exact}: correct the data"
    )


def _of_kind(answer: Any) -> tuple[Options, str] | None:
    """The options that `answer` itself implies, and the name of the right one; None if it implies none."""
    plain = _squeezed(str(answer)).casefold()
    if plain in _VERDICTS:
        return Options("", {text: text for text in _VERDICTS}), plain
    if plain and plain in "abcde" and len(plain) == 1:
        return Options("ABCDE", {}), plain.upper()
    return None


def _settled(text: str, options: Options) -> str | None:
    """The name of the one choice that `text` makes, or None."""
    lines = text.strip().splitlines()
    clauses = [_CLAUSE_END.split(tail.strip(), maxsplit=1)[0] for tail in marked_answers(text)]
    if lines:
        clauses += [re.split(_REASON, lines[-1])[0], text]
    for clause in clauses:
        named, denied = options.named_in(clause)
        if named:
            return named.pop() if len(named) == 1 and not denied else None
    return None


def _squeezed(text: str) -> str:
    """`text` without punctuation, with single spaces between words."""
    return " ".join(_PUNCTUATION.sub(" ", text).split())
