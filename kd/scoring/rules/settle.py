"""Which of several answers counts: the first, unless the text takes it back or works on with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from kd.scoring.rules.quantity import quantities
from kd.scoring.rules.rule import Found

LINE_LENGTH = 80  # how far back a line is read
EQUATION_LENGTH = 40

TAKES_BACK = re.compile(
    r"\b(?:wait|hmm+|oops|whoops|sorry|apologi[sz]e|actually|incorrect|wrong|mistake[ns]?|error|correction"
    r"|correct(?:ing|ed)|forg[oe]t|misread|miscounted|miscalculated|overlooked|missed|left out|instead|no,"
    r"|re-?(?:count|check|calculat|comput|consider|do|think|read|examin|evaluat|visit|vis)\w*|on second thought"
    r"|scratch that|not (?:right|correct|quite|what)|let me (?:fix|try again|double.check)|should have been"
    r"|upon (?:review|checking))\b|(?:^|[.!?])\W*(?:but|however)\b",
    re.IGNORECASE,
)
_OPTIONS = re.compile(
    r"\b(?:options?|choices?|choose|the list)\b", re.IGNORECASE
)  # another is chosen for want of the answer
_TENTATIVE = re.compile(
    r"\b(?:preliminary|tentative|rough|initial|initially|maybe|perhaps|might|first think|first thought|at first|guess"
    r"|tempting|seems)\b[^.\n]*\Z",
    re.IGNORECASE,
)
_STEP = re.compile(
    r"[ \t*#]*+(?:(?:step|part|stage) ?\(?[0-9a-z]{1,2}\b|\(?(?:[a-h1-9]|[ivx]{1,4})[.)])", re.IGNORECASE
)

_HEADED = re.compile(r"(?!.*answer)[^\n:]{1,30}:[ \t*$\\([]*\Z", re.IGNORECASE)  # a line by itself: "Day 1: "

_SUM = re.compile(
    r"\b(?:total|altogether|in all|combined|overall)\b[^.\n]*?(?:\b(?:is|are|has|have|gets?|makes?|of)\b|[=:])\W*\Z",
    re.IGNORECASE,
)


class Reading(NamedTuple):
    """An answer, and the text response[start:stop] that is marked as such."""

    value: Found
    start: int
    stop: int


def settled(response: str, readings: Sequence[Reading]) -> Found | None:
    """The first of `readings` (from left to right), or the last of those that take its place."""
    if not readings:
        return None
    kept = readings[0]
    for before, later in pairwise(readings):
        if later.value.answer != kept.value.answer and _replaces(response, kept, before.stop, later):
            kept = later
    return kept.value


def _replaces(response: str, kept: Reading, since: int, later: Reading) -> bool:
    """Whether `later` takes the place of `kept`: the text from `since`, the answer before it, takes that back for no
    mere option; the first was tentative or that of a step; or the later one is calculated with it or a total."""
    if TAKES_BACK.search(response, since, later.start) and not _OPTIONS.search(response, since, later.start):
        return True
    line, later_line = _line(response, kept.start), _line(response, later.start)
    if _TENTATIVE.search(line) or _works_with(response, kept.value, max(since, later.start - EQUATION_LENGTH), later):
        return True
    if _SUM.search(later_line) and not _SUM.search(line):
        return True
    final = "final" in (later_line + response[later.start : later.stop]).lower()
    return _is_step(line) and (final or _is_step(later_line))


def _is_step(line: str) -> bool:
    """Whether what stands on a line before an answer says that it is one of several."""
    return bool(_STEP.match(line) or _HEADED.match(line))


def _works_with(response: str, value: Found, start: int, later: Reading) -> bool:
    """Whether an equation that ends where `later` begins calculates with `value`."""
    if not response[start : later.start].rstrip(" $\\([").endswith("="):
        return False
    return any(one.answer == value.answer for one in quantities(response, start, later.start))


def _line(response: str, stop: int) -> str:
    """What stands before `stop` on its line, as far as it matters."""
    earliest = max(0, stop - LINE_LENGTH)
    return response[max(response.rfind("\n", earliest, stop) + 1, earliest) : stop]
