"""The answer a careful reader takes from a response, whatever model wrote it and however it was cut off.

In order: a box that holds one value; a number behind "####"; a number behind "the answer is", "Answer:" or "A:"; a
number the response opens with, unless worked steps follow; the number nearest the end. A response is read up to the
point where it goes on to another question, and numbers that only count steps or the items of a list are passed over.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

from kd.scoring.rules.number import LATEX, canonical, from_near_the_end, numbers
from kd.scoring.rules.rule import Extraction, Found, Rule, in_order

BOX_LENGTH = 200  # longer contents are no answer, and a limit keeps unclosed boxes cheap
CLAUSE_LENGTH = 200
NUMBER_LENGTH = 40

_DIGIT = re.compile("[0-9]")
_NEXT_QUESTION = re.compile(
    r"\n[ \t#*]*+(?:(?:next |new |another |follow-up )?(?:question|problem|exercise)(?: [0-9]++)?[:.]|q:|human:|user:)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{")
_BRACE = re.compile(r"[{}]")
_HASHES = re.compile(r"(?<!#)####(?!#)[^\n]*+")
_MARKER = re.compile(
    r"\banswer(?: (?:is|was|(?:would|should|must|will) be)\b|\**+:| =)\**+|^[ \t*#]*+a:", re.IGNORECASE | re.MULTILINE
)
_LEAD = re.compile(r"[\s*:=?.]*+")
# What stands behind an opening number that is a whole answer: the end, a unit and the end, or a new sentence.
_WHOLE = re.compile(
    r"[$%\"'\u00a2\u20ac\u00a3}*]*+"
    r"(?:\s++(?=[A-Z][a-z])|(?:\s?[^\W\d]++(?:/[^\W\d]++)?){0,4}+[*$]*+(?:[.!]++(?:[\s*]|\Z)|[^\S\n]*+(?:\n|\Z)))"
)
_WORKED = re.compile(r"\bstep\s*+[0-9]|^[ \t]*+[12][.)]\s", re.IGNORECASE | re.MULTILINE)
_EXPLAINED = re.compile(r"\b(?:explanation|reasoning|solution|breakdown|here.?s (?:how|why))\b", re.IGNORECASE)
_CLAUSE_END = re.compile(r"\n|[.!?]+(?=[\s*)\"']|\Z)")
_LABEL = re.compile(
    r"\b(?:steps?|solution|question|problem|part|method|example|case|scenario|option|hint|exercise|statements?)[\s#]*+\Z",
    re.IGNORECASE,
)
_BEFORE_LABELLED = re.compile(r"[^\W\d]|[\s#]")  # spares most numbers the search above
_ITEM = re.compile(r"[.):](?:\s*+[^\W\d]|\s++[$\\(*])")
_FRACTION = re.compile(
    r"([0-9]{0,12})\s?\\[dt]?frac\s?\{([0-9]{1,12})\}\s?\{([0-9]{1,12})\}"
    r"|(?:([0-9]{1,12}) )?([0-9]{1,12})/([0-9]{1,12})"
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s?\{[^{}]*+\}")


def robust(responses: Iterable[str]) -> Iterator[Extraction]:
    """Extract every response by this module's rules, each up to where it goes on to another question."""
    return _rules(map(own_part, responses))


def own_part(response: str) -> str:
    """The response up to the point where it goes on to another question."""
    digit = _DIGIT.search(response)
    following = _NEXT_QUESTION.search(response, digit.end()) if digit else None
    return response[: following.start()] if following else response


def boxed(response: str) -> Found | None:
    """The first \\boxed{} that holds one value: a number or fraction, with a unit or behind an equals sign."""
    for opening in _BOX.finditer(response):
        stop = _closing_brace(response, opening.end())
        if stop is not None:
            value = _one_value(response, opening.end(), stop)
            if value:
                return value
    return None


def hash_marks(response: str) -> Found | None:
    """The first number behind "####", GSM8K's own mark."""
    for line in _HASHES.finditer(response):
        value = next(_values(response, *line.span()), None)
        if value:
            return value
    return None


def answer_marker(response: str) -> Found | None:
    """The value in the rest of the sentence behind "the answer is", "Answer:" or, on a line's start, "A:"."""
    for marker in _MARKER.finditer(response):
        start = _skip(_LEAD, response, marker.end())
        stop = _clause_end(response, start)
        start = max(start, response.rfind("=", start, stop) + 1)
        value = next(_values(response, start, stop), None)
        if value:
            return _whole_fraction(response, value, start, stop)
    return None


def opening(response: str) -> Found | None:
    """A number, perhaps with a unit, that the response opens with, unless steps follow that work out another."""
    start = _skip(_LEAD, response, 0)
    value = next(numbers(response, start, start + NUMBER_LENGTH, LATEX), None)
    if value is None or response[start : value.start].strip("$*( ") or "* " in response[: value.start]:
        return None  # words come first, or it is an item of a list
    worked = _WORKED.search(response, value.start)
    if worked and not _EXPLAINED.search(response, value.stop, worked.start()):
        return None
    value = _whole_fraction(response, value, start, start + NUMBER_LENGTH)
    again = next(numbers(response, value.stop, value.stop + NUMBER_LENGTH, LATEX), value)
    said_twice = again.answer == value.answer and not response[value.stop : again.start].strip("$ ")
    return value if _WHOLE.match(response, again.stop if said_twice else value.stop) else None


def last_number(response: str) -> Found | None:
    """The number or fraction nearest the end that is no label."""
    for start in from_near_the_end(response):
        last = deque(_values(response, start, len(response)), maxlen=1)
        if last:
            return _whole_fraction(response, last[0], max(0, last[0].start - NUMBER_LENGTH), len(response))
    return None


def _whole_fraction(response: str, value: Found, start: int, stop: int) -> Found:
    """The fraction that `value` is part of, if response[start:stop] holds one around it; else `value`."""
    for fraction in _FRACTION.finditer(response, start, stop):
        if fraction.start() <= value.start < fraction.end():
            return _as_decimal(response, fraction) or value
    return value


def _values(response: str, start: int, stop: int) -> Iterator[Found]:
    """The numbers of response[start:stop] that are no labels of steps or items."""
    return (number for number in numbers(response, start, stop, LATEX) if not _is_label(response, number))


def _is_label(response: str, number: Found) -> bool:
    """Whether a number counts a step ("Step 3") or an item of a list ("3. …" on a line's start)."""
    before = response[max(0, number.start - 16) : number.start]
    if _BEFORE_LABELLED.match(before[-1:]) and _LABEL.search(before):
        return True
    if number.stop - number.start > 2 or not _ITEM.match(response, number.stop):
        return False
    _, line_end, indent = before.rpartition("\n")
    return bool(line_end or number.start <= 16) and not indent.strip(" \t#*>-(")


def _clause_end(response: str, start: int) -> int:
    end = _CLAUSE_END.search(response, start, start + CLAUSE_LENGTH)
    return end.start() if end else min(len(response), start + CLAUSE_LENGTH)


def _skip(pattern: re.Pattern[str], response: str, start: int) -> int:
    """Where what `pattern` matches at `start`, perhaps nothing, ends."""
    match = pattern.match(response, start)
    return match.end() if match else start


def _closing_brace(response: str, start: int) -> int | None:
    """Where the brace opened before `start` closes, if it does within a box's length."""
    depth = 1
    for brace in _BRACE.finditer(response, start, start + BOX_LENGTH):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def _one_value(response: str, start: int, stop: int) -> Found | None:
    """The one value of a box's contents, words and exponents aside; None where there is none or several."""
    start = max(start, response.rfind("=", start, stop) + 1)
    fraction = _FRACTION.search(response, start, stop)
    if fraction:
        return _as_decimal(response, fraction)
    words = [match.span() for match in _WORDS.finditer(response, start, stop)]
    values = [
        value
        for value in numbers(response, start, stop, LATEX)
        if not any(a <= value.start < b for a, b in words) and response[value.start - 1 : value.start] not in "^_"
    ]
    if not values:  # everything stands in \\text{}
        values = list(numbers(response, start, stop, LATEX))
    return values[0] if len({value.answer for value in values}) == 1 else None


def _as_decimal(response: str, fraction: re.Match[str]) -> Found | None:
    """A fraction or mixed number as a decimal: exact where it ends, else to six places; None where it divides by 0."""
    whole, above, below = fraction[1] or fraction[4] or "0", fraction[2] or fraction[5], fraction[3] or fraction[6]
    if int(below) == 0:
        return None
    value = f"{float(round(int(whole) + Fraction(int(above), int(below)), 6)):.6f}"
    negative = response[fraction.start() - 1 : fraction.start()] in ("-", "\u2212")
    return Found(canonical("-" if negative else "", value), fraction.start(), fraction.end())


RULES: dict[str, Rule] = {
    "boxed": boxed,
    "hash-marks": hash_marks,
    "answer-marker": answer_marker,
    "opening": opening,
    "last-number": last_number,
}
_rules = in_order(RULES)
