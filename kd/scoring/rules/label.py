"""Labels of answers: where a response says that its answer follows, and where what it says ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from kd.scoring.rules.sentence import SENTENCE_LENGTH, sentence_end

PREFIX_LENGTH = 40  # of a line before a label that is a heading of its own

_NAMES = ("answer", "ans.", "ans:", "ans*", "ans=", "ans =", "final", "result", "solution", "option", "choice")
_CLOSED = r"[\"'*_`)\]\u201d]*+"
_IS = (
    r"(?:is|are|was|equals?|becomes|turns out to be|comes (?:out )?to|amounts to|(?:should|would|must|will|can) be)\b"
    r"(?! not\b)"
)
_SAYS = rf"(?: (?:to|for|of|we|I|you)\b(?: [^\s.:;=!?]++){{0,9}}?)? [*_]*+{_IS}"
_COLON = r"(?:\s?\([^()\n]{1,40}\))?(?:\s*+(?:[:=\u2192\u21d2]|-+>)|[ ][-\u2013\u2014](?=[ ]))"
# "Answer:", "Ans.", `"answer":` in JSON, "the answer to that is", or a heading. An outcome ("final cost:", "the result
# is") may be one of several.
_LABEL = re.compile(
    rf"(?<![^\W_])(?:answer|ans)\b{_CLOSED}(?:{_COLON}|{_SAYS}|(?<=ans)\.(?= )|(?P<heading>[ \t]*+\n))|(?P<outcome>"
    r"\bfinal (?:result|total|value|amount|number|count|cost|price|solution|tally)\b"
    rf"{_CLOSED}(?:{_COLON}|{_SAYS})"
    rf"|(?:(?<=\bthe )|(?<=correct )|(?<=right ))(?:solution|result|option|choice)\b{_CLOSED}{_SAYS}"
    rf"|(?<![^\W_])(?:result|final|solution(?={_CLOSED}:[\s*$\\(]*+[0-9])){_CLOSED}(?P<alone>\s?:|[ \t]*+\n))",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"^[ \t*#_>]*+A:", re.MULTILINE)
_LINE_START = re.compile(r"[ \t*#_>]*+(?:the |my )?(?:final )?", re.IGNORECASE)
_LEAD = re.compile(r"(?:[\s*:=?$({\[\\\"'`]|\.(?![0-9]))*+")
_JSON_END = re.compile(r"\"|,\s*\"|[}\n]")


@dataclass
class Label:
    """A label response[start:end], and where the sentence behind it, or what stands before the next label, ends; an
    `outcome` may be one of several."""

    start: int
    end: int
    stop: int
    outcome: bool
    colon: bool


def labels(response: str) -> list[Label]:
    """The labels of answers, from left to right."""
    lower = response.lower()
    text = lower if len(lower) == len(response) else response  # a few letters have two lower ones
    found = [label for name in _NAMES for at in _places(text, name) if (label := _LABEL.match(response, at))]
    named = [
        _label(response, label, label["outcome"] is not None)
        for label in found
        if not (label["heading"] or label["alone"]) or _begins_line(response, label.start())
    ]
    if "A:" in response:
        named += [_label(response, label, outcome=False) for label in _ANSWER_LINE.finditer(response)]
    named.sort(key=lambda label: label.start)
    for one, following in pairwise(named):
        one.stop = min(one.stop, max(one.end, following.start))
    return named


def behind_lead(response: str, start: int) -> int:
    """Where the text begins behind the spaces, colons, brackets and marks of emphasis at `start`."""
    lead = _LEAD.match(response, start)
    return lead.end() if lead else start


def _label(response: str, match: re.Match[str], outcome: bool) -> Label:
    begins = behind_lead(response, match.end())
    if match[0].endswith(('":', "':")):
        end = _JSON_END.search(response, begins, begins + SENTENCE_LENGTH)
        stop = end.start() if end else min(len(response), begins + SENTENCE_LENGTH)
    else:
        stop = sentence_end(response, begins)
    return Label(*match.span(), stop, outcome, match[0].endswith(":"))


def _places(text: str, word: str) -> Iterator[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + 1)


def _begins_line(response: str, start: int) -> bool:
    line = response.rfind("\n", max(0, start - PREFIX_LENGTH), start) + 1
    return _LINE_START.fullmatch(response, line, start) is not None
