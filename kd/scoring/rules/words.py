"""Numbers spelled out: "eighteen", "twenty-four", "two hundred and five"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd.scoring.rules.rule import Found

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_SIZES = {"hundred": 100, "thousand": 1000, "million": 10**6}
_FIRST = "|".join(sorted(_VALUES, key=len, reverse=True))  # longer words first: "seventeen" begins with "seven"
_WORD = f"{_FIRST}|{'|'.join(_SIZES)}"
_SPELLED = re.compile(
    rf"(?P<sign>\b(?:minus|negative)\s)?\b(?:a (?:hundred|thousand|million)|{_FIRST})\b"
    rf"(?:(?:-| | and )(?:{_WORD})\b){{0,9}}+",
    re.IGNORECASE,
)
_PART = re.compile(rf"\b(?:{_WORD})\b", re.IGNORECASE)


def spelled_out(response: str, start: int, stop: int) -> Iterator[Found]:
    """Every number in response[start:stop] that is written in words, from left to right; a lone "one" is none, unless
    nothing else stands there."""
    for match in _SPELLED.finditer(response, start, stop):
        words = [word.lower() for word in _PART.findall(match[0])]
        if words != ["one"] or response[start:stop].strip(" *_.:$\"'").lower() == "one":
            yield Found(f"{'-' if match['sign'] else ''}{_value(words)}", *match.span())


def _value(words: list[str]) -> int:
    total = below = 0  # of finished thousands and millions; of what is counted now
    for word in words:
        size = _SIZES.get(word)
        if size is None:
            below += _VALUES[word]
        elif size == 100:
            below = max(1, below) * 100
        else:
            total, below = total + max(1, below) * size, 0
    return total + below
