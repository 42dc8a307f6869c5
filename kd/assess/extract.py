"""The number a response gives as its answer, by rules; what they cannot settle is left to a person.

The documented rules of the original's assessment, in order of precedence: the first \\boxed{}; the first line, if
all numbers on it are the same number; the first number after "the [final/correct] answer is"; the number nearest
the end. Every rule takes time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

UNDECIDED = "undecided"

# Hyphen or minus sign. A sign counts only where nothing is subtracted from: "= -5" is negative, "16-3" is not.
_SIGN = r"(?:(?<![\w)\]}.%])[-\u2212])?"
_DIGITS = r"(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
_NUMBER = re.compile(rf"({_SIGN})\$?({_DIGITS})")
_BOXED = re.compile(rf"\\boxed\{{\s*({_SIGN})(?:\\?\$\s*)?({_DIGITS})\s*(?:\\?%\s*)?\}}")
_ANSWER_IS = re.compile(r"\bthe (?:final |correct )?answer is", re.IGNORECASE)


@dataclass(frozen=True)
class Extraction:
    """The answer as a canonical number ("70000", "-3.5"), and the rule that took it; None where undecided."""

    answer: str | None
    rule: str


Rule = Callable[[str], str | None]


def extract(response: str) -> Extraction:
    """Apply the documented rules to a response (without its prompt)."""
    for name, rule in DOCUMENTED.items():
        answer = rule(response)
        if answer is not None:
            return Extraction(answer, name)
    return Extraction(None, UNDECIDED)


def first_boxed(response: str) -> str | None:
    """The first \\boxed{} that holds a number and nothing else."""
    match = _BOXED.search(response)
    return canonical(match[1], match[2]) if match else None


def first_line(response: str) -> str | None:
    """The number on the first line, if it is the only one there, however often."""
    line = response.lstrip().split("\n", 1)[0]
    found = {canonical(sign, digits) for sign, digits in _NUMBER.findall(line)}
    return found.pop() if len(found) == 1 else None


def answer_is(response: str) -> str | None:
    """The first number after the first "the answer is"."""
    phrase = _ANSWER_IS.search(response)
    match = _NUMBER.search(response, phrase.end()) if phrase else None
    return canonical(match[1], match[2]) if match else None


def last_number(response: str) -> str | None:
    """The number nearest the end."""
    found = _NUMBER.findall(response)
    return canonical(*found[-1]) if found else None


def canonical(sign: str, digits: str) -> str:
    """One spelling per number: no separators, no leading or trailing zeros, no sign of zero."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign and number != "0" else number


DOCUMENTED: dict[str, Rule] = {
    "boxed": first_boxed,
    "first-line": first_line,
    "answer-is": answer_is,
    "last-number": last_number,
}
