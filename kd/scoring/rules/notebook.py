"""The original's code path (assessment/assess.ipynb), bug for bug, in linear time.

What makes it differ from the documented rules:

- a number is any run of digits and commas with at most one point, so "3 + 4, 5" holds "3", "4," and "5" and a lone
  comma is a number too; signs are read over;
- all numbers on the first line are the same only if they are spelled the same;
- "the answer is" is read in lower case only, and what it then takes is the first number of the last earlier response
  that fell through to the last rule (the notebook reads `extr` where it means `oextr`);
- a choice that is not a number after all, such as a comma, is not replaced by a later rule but left to a person.

Where the notebook itself would stop with an error (no earlier response to read from), the row is left undecided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal

from kd.data.number import canonical
from kd.scoring.rules.rule import NOTHING, Extraction

# The notebook's expressions with possessive quantifiers: what they match is the same, and they cannot backtrack.
_DIGITS = r"([,\d]++\.?+[,\d]*+)"
_BOXED = re.compile(rf"oxed\{{ *+{_DIGITS} *+\}}")
_NUMBER = re.compile(rf"[-+]?\$?{_DIGITS}%?(?:.|\n|$)")
_ANSWER_IS = re.compile(r"the ?(?:final|correct)* ?answer ?is")


def notebook(responses: Iterable[str]) -> Iterator[Extraction]:
    """Extract every response of a log, in the log's order."""
    stale: re.Match[str] | None = None  # first number of the last response that the last rule read,
    stale_row = 0  # and where that is
    for row, response in enumerate(responses):
        boxed = _BOXED.search(response)
        if boxed:
            yield _extraction(boxed, "boxed")
            continue
        line = list(_NUMBER.finditer(response.partition("\n")[0]))
        if len({match[1] for match in line}) == 1:
            yield _extraction(line[0], "first-line")
            continue
        phrase = _ANSWER_IS.search(response)
        if phrase and _NUMBER.search(response, phrase.start()):
            found = _extraction(stale, "answer-is") if stale else NOTHING
            yield replace(found, rows_back=row - stale_row) if found.span else found
            continue
        numbers = list(_NUMBER.finditer(response))
        stale, stale_row = numbers[0] if numbers else None, row
        yield _extraction(numbers[-1], "last-number") if numbers else NOTHING


def _extraction(match: re.Match[str], rule: str) -> Extraction:
    try:
        value = float(match[1].replace(",", ""))
    except ValueError:
        return NOTHING
    return Extraction(spelled(value), rule, match.span(1))


def spelled(value: float) -> str:
    """The canonical spelling of a float, as the original's logs hold answers ("18.0" -> "18")."""
    if not math.isfinite(value):
        return str(value)
    digits = format(Decimal(repr(abs(value))), "f")  # the shortest decimal that reads back as value, no exponent
    return canonical("-" if value < 0 else "", digits)
