"""Numbers in a response: how they look, as the documented rules read them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd.data.number import CURRENCY, MINUS, canonical
from kd.scoring.rules.rule import Found

# Starts with a plain class, which the regex engine can search for quickly; what stands before it is read by `_found`.
# Its group is not possessive: Python 3.11.2 then takes a separator that belongs to no thousands.
_PLAIN = re.compile(r"[0-9][0-9]*+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]++)?")


def numbers(response: str, start: int = 0, stop: int | None = None) -> Iterator[Found]:
    """Every number in response[start:stop], from left to right.

    Digits with thousands separators and a decimal part ("1,234.50", ".5", but "Rs.5" is 5), a currency's sign before
    them, and a minus where nothing is subtracted from: "= -5" is negative, "16-3" is not.
    """
    for match in _PLAIN.finditer(response, start, len(response) if stop is None else stop):
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


def from_near_the_end(response: str) -> tuple[int, int]:
    """Where to start looking for the last number: behind a sentence or line some way before the end (most responses
    have a number there, and none goes over such a place), then at the start."""
    stop = max(0, len(response) - 200)
    return max(response.rfind("\n", 0, stop), response.rfind(". ", 0, stop)) + 1, 0


def _found(response: str, floor: int, match: re.Match[str]) -> Found:
    """The number of a run of digits, with the point, dollar sign and sign before it, none of them before `floor`."""
    digits, start = match[0], match.start()

    def before(places: int) -> str:
        return response[start - places] if start - places >= floor else ""

    if before(1) == "." and digits.isdecimal() and not (before(2).isalnum() or before(2) == "."):
        digits, start = "." + digits, start - 1
    if before(1) and before(1) in CURRENCY:
        start -= 1
        if before(1) == "\\" and before(2) and before(2) in MINUS:  # LaTeX's "-\\$5"
            start -= 1
    sign = ""
    if before(1) and before(1) in MINUS and not _ends_a_term(before(2)):
        sign, start = "-", start - 1
    return Found(canonical(sign, digits), start, match.end())


def _ends_a_term(character: str) -> bool:
    """Whether a hyphen behind this character subtracts or joins rather than negates."""
    return character.isalnum() or (character != "" and character in "_)]}.%")
