"""Quantities as models of every family write them: the number each stands for, and where it stands.

Beside plain numbers: fractions (3/4, 1 1/2, 2½, LaTeX's), thousands apart by spaces, apostrophes or by Indian habit,
a decimal comma, powers (3 x 10^4, 1e6), "12 thousand", 70k, clock times, and minus in its forms. The digit of a unit
(m^2, cm3) or of a name (H2O) is no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from kd.data.number import CURRENCY, MINUS, canonical
from kd.scoring.rules.rule import Found

VULGAR = {
    "\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4", "\u2155": "1/5",
    "\u2156": "2/5", "\u2157": "3/5", "\u2158": "4/5", "\u2159": "1/6", "\u215a": "5/6", "\u215b": "1/8",
    "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8",
}  # fmt: skip
MAGNITUDES = {
    "k": 3, "m": 6, "mn": 6, "mil": 6, "b": 9, "bn": 9,
    "hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12,
}  # fmt: skip
LONGEST = 12  # digits of a fraction's part
MOST_DIGITS = 40  # of what is calculated with
LARGEST = 10**18  # of a power
PLACES = 6  # of a fraction that does not end

_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
_ON_THE_LINE = str.maketrans(_SUPERSCRIPTS + "\u2212", "0123456789-")
# Begins with a plain class, which the regex engine can search for quickly; what stands before it is read afterwards.
# The groups are not possessive: Python 3.11.2 then takes a separator that belongs to no thousands.
_DIGITS = re.compile(
    rf"[0-9{''.join(VULGAR)}][0-9]*+(?:(?:,[0-9]{{2}}){{1,5}},[0-9]{{3}}(?![0-9])|(?:\.[0-9]{{3}}(?![0-9])){{2,6}}"
    r"|(?:(?:,|\{,\}|\\[,;:! ]|['\u2019\u00a0\u2009\u202f])[0-9]{3}(?![0-9]))*)(?:\.[0-9]++)?"
)
_SPACED = re.compile(r"(?: [0-9]{3}(?![0-9])){1,5}(?:\.[0-9]++)?")
_NUMBERED = re.compile(
    r"\b(?:day|week|month|year|step|part|case|no|number|train|group|level|page|room|grade|item)\.? \Z", re.IGNORECASE
)
_NOT_SPACED = re.compile(r"-|:[0-9]| ?[-+*/^=\u00d7\u00f7][ 0-9]|[ /][0-9]|, ?[0-9]")  # behind digits: no groups
_DECIMAL_COMMA = re.compile(r"(?:,|\{,\})([0-9]{1,2}(?![0-9])|(?<=\b0,)[0-9]++)(?!,[0-9])")
_PART = rf"[0-9]{{1,{LONGEST}}}(?:(?:,|\{{,\}})[0-9]{{3}}){{0,4}}(?:\.[0-9]{{1,{LONGEST}}})?"
_SEPARATORS = re.compile("[{},]")
_TEX_FRACTION = re.compile(
    rf"(?:\\[,;: ]|\s)?\\[cdt]?frac\s?(?:\{{(-?{_PART})\}}|([0-9]))\s?(?:\{{({_PART})\}}|([0-9]))"
)
_MIXED = re.compile(rf"(?: |-| and )([0-9]{{1,{LONGEST}}})[/\u2044]([0-9]{{1,{LONGEST}}})(?![0-9]|/)")
_VULGAR = re.compile(rf" ?([{''.join(VULGAR)}])")
_OVER = re.compile(rf"[/\u2044]({_PART})(?![0-9]|/)")
_TEN_TO = re.compile(
    r"\s?(?:\\times|\\cdot|[xX*\u00d7\u00b7])\s?10(?:\s?(?:\^|\*\*)\s?\{?([-\u2212]?[0-9]{1,2})\}?"
    rf"|([{_SUPERSCRIPTS}]{{1,2}}))|[eE]([-+]?[0-9]{{1,2}})(?!\w)"
)
_TO = re.compile(rf"(?:\^|\*\*)\s?\{{?([0-9]{{1,2}})\}}?(?![0-9])|([{_SUPERSCRIPTS}]{{1,2}})")
_MAGNITUDE = re.compile(
    r"(?:[\s~]|\\[,;: ])?(?:\\(?:text|mathrm|textrm)\s?\{\s?)?"
    r"(hundred|thousand|lakh|million|crore|billion|trillion)s?\b\}?"
    r"|([kK])(?![\w'\u2019/])|(?<=[0-9])(mn|bn)\b| (mil)\b|(?<=[0-9])([MB])(?![\w'\u2019/])",
)
_CLOCK = re.compile(r":(?:00(?::00)?(?![0-9])|([0-5][0-9])(?=\s?[aApP]\.?[mM]\b))")

_IN_TEX = frozenset("{c-")
_ATTACHED = frozenset("^_{*>")
_SPACES, _MINUSES, _CURRENCIES, _TERM_ENDS = map(frozenset, (" ~\u00a0", MINUS, CURRENCY, "_)]}.%"))
_MINUS_WORDS = ("minus", "negative", "Minus", "Negative")
_GOES_ON = re.compile(
    "|".join(
        f"(?:{behind.pattern})"
        for behind in (
            _SPACED, _DECIMAL_COMMA, _TEX_FRACTION, _MIXED, _VULGAR, _OVER, _TEN_TO, _TO, _MAGNITUDE, _CLOCK
        )
    )
)  # fmt: skip
_BEHIND_SPACE = frozenset("0123456789\\xX*\u00d7\u00b7ahtlmcb") | set(VULGAR)
_ENDS = frozenset(".;!?)]$%") | {""}
_CURRENCY_NAME = re.compile(r"(?<![A-Za-z])(?:Rs|INR|USD|EUR|GBP|US|RM|PHP|CHF|kr|R|[xX])\Z")  # or a times sign
_COMMAND = re.compile(r"\\[A-Za-z]+\Z")
_SAID_MINUS = re.compile(
    r"(?:\A|[=:({\[#$*,]|\b(?:is|was|are|be|becomes|of|to|at|by|equals|gets?))\s*[*$(]*"
    rf"(?:(?:minus|negative)\s|(?<!\A)[{MINUS}]\s)\\?[{CURRENCY}]?\Z",
    re.IGNORECASE,
)


def quantities(response: str, start: int = 0, stop: int | None = None) -> Iterator[Found]:
    """Every quantity in response[start:stop], from left to right. What stands before `start` is not looked at."""
    end = len(response) if stop is None else min(stop, len(response))
    at = start
    while match := _DIGITS.search(response, at, end):
        found = _quantity(response, start, end, match)
        at = found.stop if found else match.end()
        if found:
            yield found


def as_decimal(value: Fraction) -> str:
    """A value in canonical spelling: exact where it ends within `PLACES` places, else rounded to them."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(abs(value) * 10**PLACES)
    return canonical("-" if value < 0 else "", f"{scaled // 10**PLACES}.{scaled % 10**PLACES:0{PLACES}d}")


def _quantity(response: str, floor: int, end: int, match: re.Match[str]) -> Found | None:
    """The quantity whose first digits are `match`; None where they are an exponent, or part of a unit or a name."""
    start, stop, digits = match.start(), match.end(), match[0]
    before = response[start - 1] if start > floor else ""
    if before == ".":
        further = _character(response, floor, start - 2)
        if digits.isdecimal() and not (further.isalnum() or further == "."):
            digits, start, before = "." + digits, start - 1, further
    elif before in _IN_TEX:
        fraction = _tex_fraction(response, floor, start, end)
        if fraction:
            return _signed(response, floor, fraction.start(), fraction.end(), _ratio(fraction))
    if (before in _ATTACHED or before.isalpha()) and _belongs_to_a_word(response, floor, start):
        return None
    if digits[0] in VULGAR or (len(digits) <= MOST_DIGITS and _goes_on(response, stop, end)):
        value, stop = _with_what_follows(response, digits, start, stop, end)
        return _signed(response, floor, start, stop, value)
    sign, start = _sign(response, floor, start)
    return Found(canonical(sign, _plain(digits)), start, stop)


def _goes_on(response: str, stop: int, end: int) -> bool:
    """Whether something of `_GOES_ON` stands at `stop`. Most numbers have a space or a point there and then nothing of
    that kind, which two characters tell quicker than the expression."""
    following = response[stop : stop + 1]
    if following == " ":
        return response[stop + 1 : stop + 2] in _BEHIND_SPACE and _GOES_ON.match(response, stop, end) is not None
    return following not in _ENDS and _GOES_ON.match(response, stop, end) is not None


def _plain(digits: str) -> str:
    """Digits with the point where the decimals begin: "0,125" has no thousands, and "1.000.000" no decimals."""
    if digits.startswith("0,"):
        return f"0.{digits[2:]}"
    return digits.replace(".", "") if digits.count(".") > 1 else digits


def _with_what_follows(response: str, digits: str, start: int, stop: int, end: int) -> tuple[Fraction, int]:
    """The value of `digits`, response[start:stop], with the groups, fraction, power or word behind them, and where
    that ends."""
    if digits[0] in VULGAR:
        return Fraction(VULGAR[digits[0]]), start + 1
    digits, stop = _with_groups(response, digits, start, stop, end)
    number = Fraction(canonical("", _plain(digits)))
    for behind, combined in _COMBINED:
        found = behind.match(response, stop, end)
        value = combined(number, found) if found else None
        if found and value is not None:
            number, stop = value, found.end()
            break
    size = _MAGNITUDE.match(response, stop, end)
    if size:
        number, stop = number * 10 ** MAGNITUDES[next(filter(None, size.groups())).lower()], size.end()
    return number, stop


def _with_groups(response: str, digits: str, start: int, stop: int, end: int) -> tuple[str, int]:
    """Digits with the groups of three behind single spaces, and the decimals behind a comma, if they are such."""
    spaced = _SPACED.match(response, stop, end) if len(digits) <= 3 and digits.isdecimal() else None
    if (
        spaced
        and spaced[0] != f" {digits}"  # said twice
        and not _NOT_SPACED.match(response, spaced.end(), end)
        and not response[max(0, start - 2) : max(0, start - 1)].isdigit()
        and not _NUMBERED.search(response[max(0, start - 8) : start])
    ):
        digits, stop = digits + spaced[0], spaced.end()
    decimals = _DECIMAL_COMMA.match(response, stop, end)
    whole, _, rest = digits.partition(".")
    if decimals and response[start - 1 : start] != "," and whole.isdecimal() and len(rest) in (0, 3):
        return f"{whole}{rest}.{decimals[1]}", decimals.end()
    return digits, stop


def _tex_fraction(response: str, floor: int, start: int, end: int) -> re.Match[str] | None:
    """The \\frac whose numerator begins at `start`."""
    command = response.rfind("\\", max(floor, start - 9), start)
    fraction = _TEX_FRACTION.match(response, command, end) if command >= 0 else None
    return fraction if fraction and start < fraction.end() else None


def _ratio(match: re.Match[str]) -> Fraction | None:
    """The first given group over the second; None where that divides by zero."""
    above, below = (Fraction(_SEPARATORS.sub("", group)) for group in match.groups() if group)
    return above / below if below else None


def _mixed(number: Fraction, match: re.Match[str]) -> Fraction | None:
    part = _ratio(match)
    return number + part if part is not None and part < 1 and number.denominator == 1 else None


def _over(number: Fraction, match: re.Match[str]) -> Fraction | None:
    below = Fraction(_SEPARATORS.sub("", match[1]))
    return number / below if below else None


def _to_the(number: Fraction, match: re.Match[str]) -> Fraction | None:
    exponent = int((match[1] or match[2]).translate(_ON_THE_LINE))
    raised = number**exponent if number <= LARGEST else LARGEST + 1
    return Fraction(raised) if raised <= LARGEST else None


def _ten_to(number: Fraction, match: re.Match[str]) -> Fraction:
    return number * Fraction(10) ** int(next(filter(None, match.groups())).translate(_ON_THE_LINE))


# What may stand behind digits, and what it makes of them; the first that fits counts.
_COMBINED: tuple[tuple[re.Pattern[str], Callable[[Fraction, re.Match[str]], Fraction | None]], ...] = (
    (_TEX_FRACTION, _mixed),
    (_MIXED, _mixed),
    (_VULGAR, lambda number, match: number + Fraction(VULGAR[match[1]])),
    (_OVER, _over),
    (_TEN_TO, _ten_to),
    (_TO, _to_the),
    (_CLOCK, lambda number, match: number + Fraction(int(match[1] or 0), 60)),
)


def _signed(response: str, floor: int, start: int, stop: int, value: Fraction | None) -> Found | None:
    if value is None:
        return None
    sign, start = _sign(response, floor, start)
    return Found(as_decimal(-value if sign else value), start, stop)


def _sign(response: str, floor: int, start: int) -> tuple[str, int]:
    """The sign of the quantity at `start`, where nothing is subtracted from, and where it begins with its currency."""
    before = _character(response, floor, start - 1)
    if before in _SPACES:
        return ("-" if _said_minus(response, floor, start) else "", start)
    if before in _CURRENCIES:
        start -= 1
        sign_at = start - 2 if _character(response, floor, start - 1) == "\\" else start - 1
        return ("-", sign_at) if _negates(response, floor, sign_at) else ("", start)
    return ("-", start - 1) if _negates(response, floor, start - 1) else ("", start)


def _said_minus(response: str, floor: int, start: int) -> bool:
    """Whether "minus", "negative" or a minus and a space stand before `start`, and no term before that."""
    said = _character(response, floor, start - 2) in _MINUSES or response.endswith(_MINUS_WORDS, floor, start - 1)
    return said and _SAID_MINUS.search(response[max(floor, start - 24) : start]) is not None


def _negates(response: str, floor: int, at: int) -> bool:
    """Whether a minus stands at `at` that neither subtracts from a term nor joins words."""
    if _character(response, floor, at) not in _MINUSES:
        return False
    before = _character(response, floor, at - 1)
    return not (before.isalnum() or before in _TERM_ENDS)


def _belongs_to_a_word(response: str, floor: int, start: int) -> bool:
    """Whether the digits at `start` are an exponent or index, or stand directly behind letters that are no currency."""
    before = response[start - 1]
    if before == ">":
        return response.startswith(("<sup>", "<sub>"), start - 5)
    if before == "{":
        return _character(response, floor, start - 2) in ("^", "_")
    if before == "*":
        base = _character(response, floor, start - 3)
        return response[start - 2 : start] == "**" and base.isalnum()
    if before in "^_":
        return True
    word = response[max(floor, start - 12) : start]
    return not (_CURRENCY_NAME.search(word) or _COMMAND.search(word))


def _character(response: str, floor: int, at: int) -> str:
    return response[at] if at >= floor else ""
