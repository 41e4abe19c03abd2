"""Rewards a completion that settles for the right one of several choices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from axolotl_brainstacks.rewards.text import Completion, column, marked_answers, text_of

# Punctuation, except within a number and the sign in front of one.
_PUNCTUATION = re.compile(r"(?<!\d)[^\w\s-]|[^\w\s](?!\d)|_")
_REASON = r"\b(?:because|since|as|but)\b"
_CLAUSE_END = re.compile(rf"[\n;}}]|\.\s|{_REASON}")
_NEGATION = re.compile(r"\b(?:not|neither|nor|cannot|isn t|aren t)\b", re.IGNORECASE)
_VERDICTS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Options:
    """The choices of a row: `letters` that name them, and `texts`, from each choice's plain text to its name."""

    letters: str
    texts: dict[str, str]

    def named_in(self, clause: str) -> tuple[set[str], bool]:
        """The names of the choices that `clause` mentions, and whether it denies ("not B").

        Of nested texts the longest counts: "no change", not "no".
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
            # "A dog", "I think": a word, unless it is said of the letter.
            said_of_it = re.match(r"\s(?:is|was|or|and|seems|must)\b|\s[^a-z]|$", squeezed[match.end() :])
            if match[0] not in "AI" or said_of_it:
                found.add(match[0])
        return found | {letter.upper() for letter in re.findall(rf"(?:^|[\s(])({lower})[).:](?=\W|$)", clause)}


def exact_choice(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    r"""1.0 where the completion settles for the choice in the column ``answer``, else 0.0.

    The choices are the row's column ``choices``, a list of texts that are also called A, B, C, ... in this order; without
    one they are yes, no and maybe, or the letters A to E, whichever ``answer`` is one of. ``answer`` is a text, a letter,
    or a whole number, the position from 0 among texts. Case and punctuation do not count.

    The completion's choice is looked for after its last ``####``, ``\boxed{`` or "answer is", then in its last line, then
    in all of it. Where two are mentioned, or one is denied, nothing is chosen. Rows whose ``answer`` is no choice, where
    there is no ``choices``, give None.

    Raises ValueError when the data have no column ``answer``, or when ``answer`` is none of ``choices``.
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
    if not isinstance(choices, list) or len(choices) > len(ascii_uppercase):
        raise ValueError(f"the column `choices` holds {choices!r:.200}; it must be a list of at most 26 texts")
    exact, spelled = [str(choice) for choice in choices], [_squeezed(str(choice)).casefold() for choice in choices]
    if all(len(text) == 1 and text.upper() in ascii_uppercase for text in spelled):
        names = [text.upper() for text in spelled]
        options = Options("".join(names), {})
    else:
        names = list(ascii_uppercase[: len(choices)])
        # Texts that only punctuation tells apart (C, C++) go by their letters alone.
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
        f"the column `answer` holds {answer!r}, which is none of the row's `choices`, {exact}: correct the row in the data"
    )


def _of_kind(answer: Any) -> tuple[Options, str] | None:
    plain = _squeezed(str(answer)).casefold()
    if plain in _VERDICTS:
        return Options("", {text: text for text in _VERDICTS}), plain
    if plain and plain in "abcde" and len(plain) == 1:
        return Options("ABCDE", {}), plain.upper()
    return None


def _settled(text: str, options: Options) -> str | None:
    """The name of the one choice that `text` settles for."""
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
    """`text` without punctuation, words a space apart."""
    return " ".join(_PUNCTUATION.sub(" ", text).split())
