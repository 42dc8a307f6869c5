"""Numbers in a response: how they look, and one spelling for each."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from kd.scoring.rules.rule import Found

_SEPARATORS = re.compile(r"[^0-9.]")
MINUS = "-\u2212"  # hyphen and minus sign
# Starts with a plain class, which the regex engine can search for quickly; what stands before it is read by `_found`.
# Its group is not possessive: Python 3.11.2 then takes a separator that belongs to no thousands.
PLAIN = re.compile(r"[0-9][0-9]*+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]++)?")
# The same with LaTeX's thousands separators as well: "70{,}000", "70\,000", and a thin or no-break space.
LATEX = re.compile(r"[0-9][0-9]*+(?:(?:,|\{,\}|\\[,;:! ]|[\u00a0\u2009\u202f])[0-9]{3}(?![0-9]))*(?:\.[0-9]++)?")

GIVEN = re.compile(rf"([{MINUS}]?)\$?([0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|\.[0-9]+)%?")  # by a person, and nothing else
WHOLE_DIGITS = 18  # of a count
# How other countries write it, in terms of the above: "1.234,5", "1 234,5", "1'234,5".
_ELSEWHERE = str.maketrans(",.\u00a0\u202f'\u2019", ".,,,,,")


def numbers(
    response: str, start: int = 0, stop: int | None = None, spelling: re.Pattern[str] = PLAIN
) -> Iterator[Found]:
    """Every number in response[start:stop], from left to right.

    Digits with thousands separators and a decimal part ("1,234.50", ".5"), a dollar sign before them, and a sign
    where nothing is subtracted from: "= -5" is negative, "16-3" is not.
    """
    for match in spelling.finditer(response, start, len(response) if stop is None else stop):
        yield _found(response, start, match)


def first_number(response: str, start: int = 0) -> Found | None:
    """The first number from `start` on."""
    return next(numbers(response, start), None)


def last_number(response: str) -> Found | None:
    """The number nearest the end."""
    behind = re.search("[0-9]", response[::-1])
    if not behind:
        return None
    end = len(response) - behind.start()
    word = max(response.rfind(" ", 0, end), response.rfind("\n", 0, end)) + 1  # no number crosses white space
    found = None
    for found in numbers(response, word, end):  # noqa: B007
        pass
    return found


def from_near_the_end(response: str, end: int | None = None) -> tuple[int, int]:
    """Where to start looking for the last number: behind a sentence or line some way before the end (most responses
    have a number there, and none goes over such a place), then at the start."""
    stop = max(0, (len(response) if end is None else end) - 200)
    return max(response.rfind("\n", 0, stop), response.rfind(". ", 0, stop)) + 1, 0


def canonical(sign: str, digits: str) -> str:
    """One spelling per number: no separators, no leading or trailing zeros, no sign of zero."""
    if digits.isdecimal() and digits[0] != "0":  # most numbers
        return f"-{digits}" if sign else digits
    whole, _, fraction = _SEPARATORS.sub("", digits).partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign and number != "0" else number


def readings(cell: str) -> set[str]:
    """The numbers, in canonical spelling, that a spreadsheet's cell may mean: none, one, or two, since "70,000" is
    seventy thousand or seventy, as the comma or the point stands before the decimals."""
    text = cell.strip()
    spelled = (GIVEN.fullmatch(text), GIVEN.fullmatch(text.translate(_ELSEWHERE)))
    return {canonical(match[1], match[2]) for match in spelled if match}


def from_cell(cell: str, expected: Container[str] = ()) -> str | None:
    """The number that a spreadsheet's cell means, in canonical spelling, in which we write it; None for what is no
    number, and for what may be two of which not one alone is `expected`."""
    found = readings(cell)
    if len(found) > 1:
        found = found & {cell.strip()} or {number for number in found if number in expected}
    return found.pop() if len(found) == 1 else None


def whole_number(cell: str) -> int | None:
    """The whole number from 0 up that a spreadsheet's cell means, as `from_cell`."""
    found = {number for number in readings(cell) if number.isdecimal() and len(number) <= WHOLE_DIGITS}
    return int(found.pop()) if len(found) == 1 else None


def _found(response: str, floor: int, match: re.Match[str]) -> Found:
    """The number of a run of digits, with the point, dollar sign and sign before it, none of them before `floor`."""
    digits, start = match[0], match.start()

    def before(places: int) -> str:
        return response[start - places] if start - places >= floor else ""

    if before(1) == "." and digits.isdecimal() and not (before(2).isdecimal() or before(2) == "."):
        digits, start = "." + digits, start - 1
    if before(1) == "$":
        start -= 1
    sign = ""
    if before(1) and before(1) in MINUS and not _ends_a_term(before(2)):
        sign, start = "-", start - 1
    return Found(canonical(sign, digits), start, match.end())


def _ends_a_term(character: str) -> bool:
    """Whether a hyphen behind this character subtracts or joins rather than negates."""
    return character.isalnum() or (character != "" and character in "_)]}.%")
