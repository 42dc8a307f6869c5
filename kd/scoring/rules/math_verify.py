"""Math-Verify (the library's own `parse`), for comparison: the answer it reads, as a number.

At its best for answers of this kind: a box counts before any other mark, and what the library's `verify` holds for
equal is the same number: 40 % and 40, a box of text that is a number, an equation and its right side. It parses LaTeX
with a grammar, so it is hundreds of times slower than the other rule sets; it stops by its own timeout of five seconds
a response.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kd.data.number import given
from kd.scoring.rules.notebook import spelled
from kd.scoring.rules.rule import NOTHING, Extraction


def math_verify(responses: Iterable[str]) -> Iterator[Extraction]:
    """What Math-Verify parses from each response; undecided where that is not a number."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for response in responses:
        parsed = map(_number, parse(response, extraction_config=targets))
        answer = next((number for number in parsed if number is not None), None)
        yield NOTHING if answer is None else Extraction(answer, "math-verify", None)


def _number(candidate: Any) -> str | None:
    """A parsed expression as a number, as `verify` compares it; None where it has no one real value."""
    from math_verify.grader import get_pct_val

    value = getattr(candidate, "rhs", candidate)
    if isinstance(value, str) or getattr(value, "is_Symbol", False):  # what was not parsed, and text in a box
        return given(str(value))
    value = get_pct_val(value, value)
    if not getattr(value, "is_number", False) or not value.is_real:
        return None
    try:
        return spelled(float(value))
    except OverflowError:
        return None
