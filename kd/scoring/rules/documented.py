"""The four rules as the paper's repository documents them: the package's default.

In order of precedence: the first \\boxed{}; the first line, if all numbers on it are the same number; the first
number after "the [final/correct] answer is"; the number nearest the end.
"""

from __future__ import annotations

import re

from kd.scoring.rules.number import first_number, last_number, numbers
from kd.scoring.rules.rule import Found, Rule, in_order

_BOXED = re.compile(r"\\boxed\{([^{}]*+)\}")
_FILLING = re.compile(r"[\s\\$%]*+")  # what may stand around the number in a box
_ANSWER_IS = re.compile(r"\bthe (?:final |correct )?answer is", re.IGNORECASE | re.ASCII)


def first_boxed(response: str) -> Found | None:
    """The first \\boxed{} that holds a number and nothing else."""
    for box in _BOXED.finditer(response):
        number = next(numbers(response, *box.span(1)), None)
        if (
            number
            and _FILLING.fullmatch(response, box.start(1), number.start)
            and _FILLING.fullmatch(response, number.stop, box.end(1))
        ):
            return number
    return None


def first_line(response: str) -> Found | None:
    """The number on the first line, if it is the only one there, however often."""
    start = len(response) - len(response.lstrip())
    stop = response.find("\n", start)
    first = None
    for number in numbers(response, start, len(response) if stop < 0 else stop):
        first = first or number
        if number.answer != first.answer:
            return None
    return first


def answer_is(response: str) -> Found | None:
    """The first number after the first "the answer is"."""
    if "answer is" not in response.lower():  # far quicker than the search, and most responses end here
        return None
    phrase = _ANSWER_IS.search(response)
    return first_number(response, phrase.end()) if phrase else None


RULES: dict[str, Rule] = {
    "boxed": first_boxed,
    "first-line": first_line,
    "answer-is": answer_is,
    "last-number": last_number,
}
documented = in_order(RULES)
