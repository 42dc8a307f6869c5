"""The four rules as the paper's repository documents them: the package's default.

In order of precedence: the first \\boxed{}; the first line, if all numbers on it are the same number; the first
number after "the [final/correct] answer is"; the number nearest the end.
"""

from __future__ import annotations

import re

from kd.assess.rules.number import DIGITS, NUMBER, SIGN, found
from kd.assess.rules.rule import Found, Rule, in_order

_BOXED = re.compile(rf"\\boxed\{{\s*+({SIGN})(?:\\?\$\s*+)?({DIGITS})\s*+(?:\\?%\s*+)?\}}")
_ANSWER_IS = re.compile(r"\bthe (?:final |correct )?answer is", re.IGNORECASE)


def first_boxed(response: str) -> Found | None:
    """The first \\boxed{} that holds a number and nothing else."""
    match = _BOXED.search(response)
    return found(match) if match else None


def first_line(response: str) -> Found | None:
    """The number on the first line, if it is the only one there, however often."""
    start = len(response) - len(response.lstrip())
    end = response.find("\n", start)
    numbers = [found(match) for match in NUMBER.finditer(response, start, end if end >= 0 else len(response))]
    return numbers[0] if len({number.answer for number in numbers}) == 1 else None


def answer_is(response: str) -> Found | None:
    """The first number after the first "the answer is"."""
    phrase = _ANSWER_IS.search(response)
    match = NUMBER.search(response, phrase.end()) if phrase else None
    return found(match) if match else None


def last_number(response: str) -> Found | None:
    """The number nearest the end."""
    last = None
    for last in NUMBER.finditer(response):  # noqa: B007
        pass
    return found(last) if last else None


RULES: dict[str, Rule] = {
    "boxed": first_boxed,
    "first-line": first_line,
    "answer-is": answer_is,
    "last-number": last_number,
}
documented = in_order(RULES)
