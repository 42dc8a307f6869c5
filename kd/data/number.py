"""Numbers that people, data sets and spreadsheets write: one spelling for each, and when two are equal."""

from __future__ import annotations

import re
from collections.abc import Container

MINUS = "-\u2212\u2013\u2014\u2011\ufe63\uff0d"  # hyphens, the minus sign, dashes
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9\u20a6\u20b1\u20a9"
WHOLE_DIGITS = 18  # of a count

_SEPARATORS = re.compile(r"[^0-9.]")
# A number and nothing else: its sign before or behind its currency ("-$5", "$-5"), and perhaps a full stop behind it.
_GIVEN = re.compile(
    rf"(?P<sign>[{MINUS}+]?)(?:[{CURRENCY}]\s?)?(?P<inner>(?<=[{CURRENCY}])[{MINUS}+])?"
    r"(?P<digits>[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)\s?%?\.?"
)
# How other countries write it, in terms of the above: "1.234,5", "1 234,5", "1'234,5".
_ELSEWHERE = str.maketrans(",.\u00a0\u202f'\u2019", ".,,,,,")


def canonical(sign: str, digits: str) -> str:
    """One spelling per number: no separators, no leading or trailing zeros, no sign of zero."""
    if digits.isdecimal() and digits[0] != "0":  # most numbers
        return f"-{digits}" if sign else digits
    whole, _, fraction = _SEPARATORS.sub("", digits).partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign and number != "0" else number


def equal(answer: str | None, truth: str) -> bool:
    """Whether an answer (None is none) is the true one, both in canonical spelling.

    A rule set that compares text, as lm-evaluation-harness does, keeps the response's spelling: its "18.00" is not 18.
    """
    return answer == truth


def given(text: str) -> str | None:
    """The number that `text` is, in canonical spelling, in any dress: "+18", "$18", "18.", ".5", "1,234", "\u22125";
    None where it is none."""
    match = _GIVEN.fullmatch(text.strip())
    if not match or (match["sign"] and match["inner"]):
        return None
    return canonical("-" if (match["sign"] or match["inner"] or "+") != "+" else "", match["digits"])


def readings(cell: str) -> set[str]:
    """The numbers, in canonical spelling, that a spreadsheet's cell may mean: none, one, or two, since "70,000" is
    seventy thousand or seventy, as the comma or the point stands before the decimals."""
    text = cell.strip()
    return {number for number in (given(text), given(text.translate(_ELSEWHERE))) if number is not None}


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
