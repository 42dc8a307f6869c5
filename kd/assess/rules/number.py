"""Numbers in a response: how they look, and one spelling for each."""

from __future__ import annotations

import re

from kd.assess.rules.rule import Found

# Hyphen or minus sign. A sign counts only where nothing is subtracted from: "= -5" is negative, "16-3" is not.
SIGN = r"(?:(?<![\w)\]}.%])[-\u2212])?"
DIGITS = r"(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?|(?<![0-9.])\.[0-9]++)"
NUMBER = re.compile(rf"({SIGN})\$?({DIGITS})")


def found(match: re.Match[str]) -> Found:
    """What a match of sign (group 1) and digits (group 2) says."""
    return Found(canonical(match[1], match[2]), match.start(), match.end())


def canonical(sign: str, digits: str) -> str:
    """One spelling per number: no separators, no leading or trailing zeros, no sign of zero."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign and number != "0" else number
