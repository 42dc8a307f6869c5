"""lm-evaluation-harness's two GSM8K filters (lm_eval/tasks/gsm8k), for comparison.

The harness compares text, not numbers, after taking out commas, dollar signs and a final point: "18.00" is not "18".
So these answers keep the response's spelling.
"""

from __future__ import annotations

import re
from collections import deque

from kd.scoring.rules.number import from_near_the_end
from kd.scoring.rules.rule import Found, in_order

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = str.maketrans("", "", ",$")


def strict_match(response: str) -> Found | None:
    """The first number behind "#### "."""
    match = _STRICT.search(response)
    return _found(match, 1) if match else None


def flexible_extract(response: str) -> Found | None:
    """The last run of two or more digits, points, commas and dollar signs, or single digit."""
    for start in from_near_the_end(response):
        last = deque(_FLEXIBLE.finditer(response, start), maxlen=1)
        if last:
            return _found(last[0], 0)
    return None


def _found(match: re.Match[str], group: int) -> Found | None:
    answer = match[group].translate(_IGNORED).removesuffix(".")
    return Found(answer, *match.span(group)) if answer else None


strict = in_order({"strict-match": strict_match})
flexible = in_order({"flexible-extract": flexible_extract})
