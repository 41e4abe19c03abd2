"""Rewards a completion whose final number is the row's."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from axolotl_brainstacks.rewards.text import Completion, column, marked_answers, text_of

_LONGEST = 20_000  # characters that are read of a completion, counted from its end
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# No number: digits of a name (x2), an index or an exponent (m^2, x_{1}, 2**3), and what carries one (10^3).
# A sign after a closing bracket or a letter is a minus between two terms.
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
_SUM = re.compile(r"(?:[\s\d.,+*/()$€£\u00d7\u00f7x-]*=)*")  # in front of its result
_SPELLINGS = [("\u2212", "-"), ("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\$", "$"), ("\\%", "%")]


class Number(NamedTuple):
    value: Fraction
    percent: bool

    def same(self, other: Number) -> bool:
        """Exact equality; a percent sign may be read as a unit or as a hundredth: 50% is 50, 0.5 and 1/2."""
        if self.percent == other.percent:
            return self.value == other.value
        share, plain = (self, other) if self.percent else (other, self)
        return plain.value in (share.value, share.value / 100)


def numeric_answer(prompts: list[Any], completions: list[Completion], **columns: list[Any]) -> list[float | None]:
    r"""1.0 where the completion's final number equals the column ``answer``, else 0.0.

    The final number is the first one after the last ``####``, ``\boxed{`` or "answer is" (of a sum, its result), or else
    the last one of all. Numbers may have signs, commas between thousands, decimals, exponents, a currency in front, and a
    percent sign or a unit behind; fractions and mixed numbers are read too, in LaTeX as well. They are compared exactly,
    without rounding. A text in ``answer`` is read in the same way, so a worked solution will do. Rows whose answer holds
    no number give None.

    Raises ValueError when the data have no column ``answer``.
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
    """The number that `text` ends in or names as its answer; None if it holds none."""
    text = _plain(text[-_LONGEST:])
    for tail in marked_answers(text):
        if match := _NUMBER.search(_SUM.sub("", tail, count=1)):
            return _value(match)
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _plain(text: str) -> str:
    """`text` with LaTeX's spellings of numbers as plain ones."""
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2} is a mixed number
    return _FRACTION.sub(r"\1/\2", text)


def _value(match: re.Match[str]) -> Number | None:
    number, denominator = (
        match[group].replace(",", "") if match[group] else "1" for group in ("number", "denominator")
    )
    whole = match["whole"] or "0"
    if len(match[0]) > 400 or Fraction(denominator) == 0:  # longer ones are no answers, and slow to compute with
        return None
    value = Fraction(whole) + Fraction(number) / Fraction(denominator)
    negative = "-" in (match["sign"], match["inner_sign"])
    return Number(-value if negative else value, match["percent"] is not None)
