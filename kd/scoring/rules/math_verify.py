"""Math-Verify (the library's own `parse`), for comparison: the answer it reads, as a number.

It parses LaTeX with a grammar, so it is hundreds of times slower than the other rule sets; it stops by its own
timeout of five seconds a response.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kd.scoring.rules.notebook import spelled
from kd.scoring.rules.rule import NOTHING, Extraction


def math_verify(responses: Iterable[str]) -> Iterator[Extraction]:
    """What Math-Verify parses from each response; undecided where that is not a number."""
    from math_verify import parse

    for response in responses:
        value = next((_number(candidate) for candidate in parse(response)), None)
        yield NOTHING if value is None else Extraction(spelled(value), "math-verify", None)


def _number(candidate: Any) -> float | None:
    """A parsed expression as a number, an equation by its right side; None where it has no one real value."""
    value = getattr(candidate, "rhs", candidate)
    if not getattr(value, "is_number", False) or not value.is_real:
        return None
    try:
        return float(value)
    except OverflowError:
        return None
