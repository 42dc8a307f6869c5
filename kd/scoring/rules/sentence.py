"""Which of a sentence's quantities it gives as the answer.

A sentence that begins with a quantity gives that one, or what its arithmetic comes to. Else it is what the last equals
sign gave, where the sentence has it again; else the first quantity that it does not merely restate ("for 16 cups",
"the 3 boys", "6 years from now").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from kd.scoring.rules.arithmetic import calculated
from kd.scoring.rules.quantity import quantities
from kd.scoring.rules.rule import Found

SENTENCE_LENGTH = 200  # a limit keeps long lines cheap
ASIDE_LENGTH = 80  # longer brackets are none

# A point behind an abbreviation or an option's letter ("C. 15") ends none. Begins with a plain class, which is quick.
_END = re.compile(
    r"[\n.!?<](?:(?<=\n)|(?<=<)/|(?<=[.!?])(?<!\bRs\.)(?<!\bNo\.)(?<!\bapprox\.)[.!?]*+"
    r"(?!(?:(?<=\W[A-E]\.)|(?<=\W[A-E][*)]\.)|(?<=\W[A-E]\*\*\.))[*)]*+\s*+[$\\(]*+[0-9])(?=[\s*)\"'<$]|\Z))",
    re.IGNORECASE,
)
_STARTS = (". ", "\n", "! ", "? ")  # behind these
_LIGHT = re.compile(
    r"(?:[\s*$({\[\\\"'`:=~\u2248<>_]|\b(?:about|approximately|approx|roughly|around|exactly|only|just|simply|therefore|thus"
    r"|so|that is|equal to|a total of|option|choice|not less than|at least|at most)\b[.:,]?"
    r"|\(?\b[A-Ea-e]\**[.):]+\**(?=[\s*$(]))*+"
)
# What comes before the clause that a sentence is about: "After giving away 12 marbles, …".
_BEFOREHAND = re.compile(
    r"\W*+(?:that )?(?:since|if|when|because|after|as|before|in|over|for|with|by|at|on|out of|of|during|given|having"
    r"|once|while|although|to|from|starting)\b[^,;.]*+(?:,[0-9]{3}[^,;.]*+)?,\s",
    re.IGNORECASE,
)
_RESTATED = re.compile(
    r"(?:\b(?:the|these|those|all|both|each|every|per|her|his|their|its|our|your|my|\w+'s|first|last|next|other|another"
    r"|remaining|same|day|week|month|year|grade|page|for|after|before|in|within|during|over|under|at|on|from|by|than"
    r"|between|among|reach|and the|out of|(?<!left )(?<!up )with"
    r"|(?<!total )(?<!sum )(?<!average )(?<!profit )(?<!mean )(?<!maximum )(?<!minimum )of)\s+"
    r"|\bat least\s+)[$*(\\]*\Z",
    re.IGNORECASE,
)
_OFFSET = re.compile(
    r"-[a-z]|\s?(?:[^\W\d]++ ){1,2}(?:before|after|ago|later|earlier|from now|from then)\b"
    r"|\s?\\?% (?!of\b|are\b|is\b|were\b|was\b|more\b|less\b|have\b|has\b)[a-z]"
)
_DIRECT = re.compile(
    r"\b(?:is|are|was|were|be|equals?|giving|gives?|makes?|get|leaving|total of|approximately|about)(?: us)?"
    r"(?: about| approximately| only)?\s[*$(\\]*\Z",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"(?:\s[^\W\d]++){1,4}?\s(?:is|are|was|were|costs?|weighs?|ha[sd]|have|needs?|eats?|earns?|makes?|gets?|takes?|equals?|contains?"
    r"|pays?|will \w+|would \w+|can \w+)\s(?:about |approximately |a total of |exactly |only )?[*$(\\]*"
)
# What numbers no quantity but a step, a part or an item of a list.
_LABELS = frozenset(
    "step steps solution question problem part method example case scenario option hint exercise statement "
    "statements".split()
)
_ITEM = re.compile(r"[.):](?:[*_]*+\s*+[^\W\d]|[*_]*+\s++[$\\(*])|[.)][*_]++\s")


def sentence_start(response: str, stop: int) -> int:
    """Where the sentence or line begins that goes on at `stop`; behind a space where it is long."""
    earliest = max(0, stop - SENTENCE_LENGTH)
    start = max(response.rfind(mark, earliest, stop) for mark in _STARTS) + 1
    return start or (response.find(" ", earliest, stop) + 1 or earliest if earliest else 0)


def sentence_end(response: str, start: int) -> int:
    """Where the sentence or line from `start` ends."""
    end = _END.search(response, start, start + SENTENCE_LENGTH)
    return end.start() if end else min(len(response), start + SENTENCE_LENGTH)


def finished(response: str, start: int, stop: int) -> re.Match[str] | None:
    """The end of the sentence that goes on at `start`, if it has one before `stop`."""
    return _END.search(response, start, stop)


def counted(response: str, start: int, stop: int) -> Iterator[Found]:
    """The quantities of response[start:stop] that are no labels of steps or items."""
    return (value for value in quantities(response, start, stop) if not is_label(response, value))


def is_label(response: str, value: Found) -> bool:
    """Whether a number counts a step ("Step 3") or an item of a list ("3. …" on a line's start)."""
    before = response[max(0, value.start - 16) : value.start]
    word = before.split()[-1:]
    if word and word[0].strip("#*(_").lower() in _LABELS:
        return True
    if value.stop - value.start > 2 or not _ITEM.match(response, value.stop):
        return False
    _, line_end, indent = before.rpartition("\n")
    return bool(line_end or value.start <= 16) and not indent.strip(" \t#*>-(_")


def stated(response: str, start: int, stop: int, result: str | None = None) -> Found | None:
    """The quantity that response[start:stop], a sentence behind an answer's mark, gives; `result` is what the last
    equals sign before it gave."""
    beforehand = _BEFOREHAND.match(response, start, stop)
    values = list(counted(response, beforehand.end(), stop)) if beforehand else []
    values = values or list(counted(response, start, stop))
    if not values:
        return None
    if _begins_with(response, start, values[0]):
        if len(values) == 1 or not _SUBJECT.fullmatch(response, values[0].stop, values[1].start):
            return calculated(response, start, values)
        del values[0]  # what is told of: "5 books cost …"
    equals = response.rfind("=", start, stop) + 1
    behind = [value for value in values if value.start >= equals] if equals else []
    if behind:
        return calculated(response, equals, behind)
    return _recurring(values, result) or _not_restated(response, start, values) or values[-1]


def concluded(response: str, start: int, values: Sequence[Found], result: str | None, last: bool) -> Found:
    """The quantity that a finished sentence from `start`, which has `values`, ends in: `result`, what the last equals
    sign gave, where it recurs, else in the `last` sentence the last that is not merely restated, else the last."""
    if _DIRECT.search(response[max(start, values[-1].start - 24) : values[-1].start]):
        return values[-1]
    return _recurring(values, result) or (last and _not_restated(response, start, values[::-1])) or values[-1]


def _begins_with(response: str, start: int, first: Found) -> bool:
    """Whether a sentence begins with its first quantity."""
    light = _LIGHT.match(response, start, first.start)
    return light is not None and light.end() >= first.start and not _OFFSET.match(response, first.stop)


def _recurring(values: Sequence[Found], result: str | None) -> Found | None:
    return next((value for value in values if value.answer == result), None)


def restates(response: str, start: int, value: Found) -> bool:
    """Whether a sentence from `start` merely restates a quantity: "for 16 cups", "the 3 boys", "6 years from now", "(a
    third of 12)"."""
    before = response[max(start, value.start - 24) : value.start]
    near = max(start, value.start - ASIDE_LENGTH)
    aside = response.rfind("(", near, value.start)
    if aside > max(near, response.rfind(")", near, value.start)) and response[aside - 1] == " ":
        return True
    return bool(_RESTATED.search(before) or _OFFSET.match(response, value.stop))


def _not_restated(response: str, start: int, values: Iterable[Found]) -> Found | None:
    return next((value for value in values if not restates(response, start, value)), None)
