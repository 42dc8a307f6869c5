"""Arithmetic as responses write it: which quantities belong to an equation, and what it comes to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from operator import add, mul, sub, truediv

from kd.scoring.rules.quantity import MOST_DIGITS, as_decimal, quantities
from kd.scoring.rules.rule import Found

MOST_TERMS = 20  # of a calculation
RESULT_LENGTH = 40  # how far behind an equals sign its equation is read

_NO_UNIT = r"(?!(?:x|X|times|plus|minus|less|divided|multiplied|equals|is|or|so|and)\b)"
_UNIT = rf"(?:\s?\\?%|\s?(?:\\text|\\mathrm)\s?\{{[^{{}}]*+\}}|\s{_NO_UNIT}[^\W\d]++(?:/[^\W\d]++)?){{0,2}}+"
_PADDING = r"[\s*$)(\]\[{}\\,;<>|]*+"
# Between two quantities: arithmetic, or an equals sign.
_OPERATOR = re.compile(
    rf"{_UNIT}[\s)$\]\\]*+(?:[-+*/\u00d7\u00f7\u00b7\u2212\u2013]|[xX]\b|times\b|cdot\b|div\b|plus\b|minus\b"
    r"|less\b(?! than)|multiplied by\b|divided by\b)[\s($\[\\{*]*+"
)
_WORKED_ON = re.compile(r"[ )$\\]*+(?:[+/\u00d7\u00f7^]|\*(?!\*)|x\b|times\b|cdot\b|div\b|- )")
_EQUALS = re.compile(
    rf"{_UNIT}[\s)$\]}}\\*]*+(?:=|\u2248|approx\b|>>|equals\b|is equal to\b){_PADDING}(?:=\s?)?(?:<<)?[\s*$(\\]*+"
)
_CONCLUDES = re.compile(
    r"[\s,;:.*)]*(?:(?:and|so|or|thus|hence|therefore|that|this|it|which|i\.e\.)\s+)*(?:or|so|that is|i\.e\.|thus|hence"
    r"|therefore|is|are|was|equals?|makes?|gives?|giving|making|means?|comes? to|for a total of|totals?|\u2192|->"
    r"|\u21d2|=>)\b[\s:*$(\\,]*"
)
_THEN = re.compile(r"[\s,;.$)]*+(?:and|so|then)?[\s$(\\]*+")  # between two equations
_SIGN = re.compile(
    r"[-+*/()\u00d7\u00f7\u00b7\u2212\u2013]|times|cdot|div|plus|minus|multiplied by|divided by|[xX](?![a-z])"
)
_SIGNS = {
    "\u00d7": "*", "\u00b7": "*", "times": "*", "cdot": "*", "multiplied by": "*", "x": "*",
    "\u00f7": "/", "div": "/", "divided by": "/", "plus": "+", "minus": "-", "\u2212": "-", "\u2013": "-",
}  # fmt: skip
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {"+": add, "-": sub, "*": mul, "/": truediv}


def calculated(response: str, start: int, values: Sequence[Found]) -> Found:
    """What the arithmetic that `values` begin with comes to, or what is said behind it ("6 * 7, so 42")."""
    found, used = arithmetic(response, start, values)
    while found and 1 < used < len(values) and _THEN.fullmatch(response, values[used - 1].stop, values[used].start):
        further, more = arithmetic(response, values[used].start, values[used:])
        if not further or more == 1:
            break
        found, used = further, used + more
    if used < len(values) and found is None and _CONCLUDES.match(response, values[used - 1].stop, values[used].start):
        return values[used]
    return found or evaluated(response, start, values[:used])


def arithmetic(response: str, start: int, values: Sequence[Found]) -> tuple[Found | None, int]:
    """What the equations that `values` begin with give, their last side that is one quantity, and how many of the
    values are in them; one quantity alone gives itself, and arithmetic without an equals sign nothing yet."""
    sides, used = [[values[0]]], 1
    for last, value in pairwise(values):
        if _EQUALS.fullmatch(response, last.stop, value.start):
            sides.append([value])
        elif _OPERATOR.fullmatch(response, last.stop, value.start) or _signed_term(response, last, value):
            sides[-1].append(value)
        else:
            break
        used += 1
    lone = [side[0] for side in sides if len(side) == 1]
    if lone:
        return lone[-1], used
    return (evaluated(response, start, sides[-1]) if len(sides) > 1 else None), used


def evaluated(response: str, start: int, terms: Sequence[Found]) -> Found:
    """The value of quantities with arithmetic between them; of a range (3-4), and of what has no value, the first."""
    short = len(terms) <= MOST_TERMS and all(len(term.answer) <= MOST_DIGITS for term in terms)
    value = _value(response, start, terms) if short else None
    if value is None:
        return terms[0]
    is_range = value < 0 and len(terms) == 2 and not response[terms[0].stop : terms[1].start].isspace()
    return terms[0] if is_range else Found(as_decimal(value), terms[0].start, terms[-1].stop)


def _value(response: str, start: int, terms: Sequence[Found]) -> Fraction | None:
    """The same by operators' precedence, with two stacks."""
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and open brackets

    def apply(least: int) -> None:
        while waiting and waiting[-1] != "(" and _RANK[waiting[-1]] >= least:
            right, left = values.pop(), values.pop()
            values.append(_OPERATIONS[waiting.pop()](left, right))

    at = start
    try:
        for term in terms:
            for sign in _SIGN.findall(response, at, term.start):
                if sign == "(":
                    waiting.append(sign)
                elif sign == ")":
                    apply(1)
                    waiting[-1:] = []
                elif len(values) > 0:
                    operator = _SIGNS.get(sign.lower(), sign)
                    apply(_RANK[operator])
                    waiting.append(operator)
            if len(values) > sum(sign != "(" for sign in waiting):  # "50 -8"
                waiting.append("+")
            values.append(_exact(term))
            at = term.stop
        waiting = [sign for sign in waiting if sign != "("]
        apply(1)
    except (ZeroDivisionError, IndexError):  # an operator without its second term
        return None
    return values[0] if len(values) == 1 else None


def _exact(term: Found) -> Fraction:
    """A quantity's value; a fraction's that was rounded to its places as it was before."""
    value = Fraction(term.answer)
    simple = value.limit_denominator(1000)
    return simple if as_decimal(simple) == term.answer else value


def result_before(response: str, start: int, stop: int) -> str | None:
    """What the last equals sign in response[start:stop] gave, if that is one quantity."""
    equals = response.rfind("=", start, stop) + 1
    values = list(quantities(response, equals, min(stop, equals + RESULT_LENGTH))) if equals else []
    found = arithmetic(response, equals, values)[0] if values else None
    return found.answer if found and not _WORKED_ON.match(response, found.stop, stop) else None


def _signed_term(response: str, last: Found, value: Found) -> bool:
    return value.answer.startswith("-") and response[last.stop : value.start].isspace()
