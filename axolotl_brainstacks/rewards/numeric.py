"""A reward for completions whose final number is the right one."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from axolotl_brainstacks.rewards.text import Completion, column, marked_answers, text_of

_LONGEST = 20_000  # only so many characters at a completion's end are read
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# Not numbers: digits of a name (x2), an index or exponent (m^2, x_{1}, 2**3), and the base of an exponent (10^3).
# A sign after a closing bracket or a letter is a minus between two terms, not a part of the number.
_NUMBER = re.compile(
    rf"""
    (?<![\w.^]) (?<![\^_][-+{{]) (?<!\d\*\*)
    (?> (?P<sign> (?<![)\]]) [-+] )? [$€£]? (?P<inner_sign> (?<=[$€£]) - )?
        (?P<whole> \d+[ ] (?=\d+/\d) )?
        (?P<number> {_DIGITS} (?: [eE][-+]?\d{{1,3}} (?!\d) )? )
        (?: \s?/\s? (?P<denominator> {_DIGITS} ) )?
        (?P<percent> \s?% )? )
    (?! \s*\^ | \*\*\d )
    """,
    re.VERBOSE,
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-\d.,]+)\s*\}\s*\{\s*([-\d.,]+)\s*\}")
_SUM = re.compile(r"(?:[\s\d.,+*/()$€£\u00d7\u00f7x-]*=)*")  # a calculation up to the equals sign before its result
_SPELLINGS = [("\u2212", "-"), ("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\$", "$"), ("\\%", "%")]


class Number(NamedTuple):
    """A number as written in a text: its exact value, and whether a percent sign follows it."""

    value: Fraction
    percent: bool

    def same(self, other: Number) -> bool:
        """Whether the two are exactly equal; a percent sign may count as a unit or as a hundredth: 50% equals 50 and 1/2."""
        if self.percent == other.percent:
            return self.value == other.value
        share, plain = (self, other) if self.percent else (other, self)
        return plain.value in (share.value, share.value / 100)


def numeric_answer(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    r"""Return 1.0 if the completion's final number equals the column ``answer``, else 0.0.

    The final number is the first one after the last ``####``, ``\boxed{`` or "answer is"; if a calculation stands there, it
    is the result. Without such a marker it is the last number of all. A number may have a sign, commas between thousands,
    decimals, an exponent, a currency before it, and a percent sign or a unit after it; fractions and mixed numbers count too,
    also in LaTeX. Numbers are compared exactly, without rounding. A text in ``answer`` is read in the same way, so it may be a
    worked solution.

    Args:
        prompts: not used.
        completions: the completions to score.
        columns: the data's columns, with one entry per completion.

    Returns:
        One reward per completion; None if its ``answer`` has no number.

    Raises:
        ValueError: if the data have no column ``answer``.
    """
    answers = column(columns, "answer", "numeric_answer")
    return [_reward(completion, answer) for completion, answer in zip(completions, answers, strict=True)]


def _reward(completion: Completion, answer: Any) -> float | None:
    if answer is None or isinstance(answer, bool):
        return None
    wanted = final_number(str(answer))
    if wanted is None:
        return None
    given = final_number(text_of(completion))
    return float(given is not None and given.same(wanted))


def final_number(text: str) -> Number | None:
    """The number that `text` names as its answer, or else the last one in it; None if it has no number."""
    text = _plain(text[-_LONGEST:])
    for tail in marked_answers(text):
        if match := _NUMBER.search(_SUM.sub("", tail, count=1)):
            return _value(match)
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _plain(text: str) -> str:
    """`text` with numbers that LaTeX spells in its own way written plainly."""
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2} is a mixed number
    return _FRACTION.sub(r"\1/\2", text)


def _value(match: re.Match[str]) -> Number | None:
    number = match["number"].replace(",", "")
    denominator = (match["denominator"] or "1").replace(",", "")
    whole = match["whole"] or "0"
    if (
        len(match[0]) > 400 or Fraction(denominator) == 0
    ):  # a longer number is no answer, and exact arithmetic is slow on it
        return None
    value = Fraction(whole) + Fraction(number) / Fraction(denominator)
    negative = "-" in (match["sign"], match["inner_sign"])
    return Number(-value if negative else value, match["percent"] is not None)
