"""What a report's explorer shows: every question, every response to it, and what each reader took from it.

A reader is a rule set, or what the table counts (a rule set's answers and behind them a person's). All is packed into
one compressed text, which the page unpacks after it is painted.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.scoring.rules.rule import UNDECIDED, Extraction

LEVEL = 4  # a few per cent larger than 6, in half the time


@dataclass(frozen=True)
class Question:
    """A test question, its worked answer and the number it comes to."""

    text: str
    worked: str
    truth: str


@dataclass(frozen=True)
class Responses:
    """One run's responses in the order of the questions, how long they are, which its limit cut off, and per
    reader what was taken from each and whether that is right."""

    texts: Sequence[str]
    tokens: Sequence[int]
    cut: Sequence[bool]
    taken: Mapping[str, Sequence[Extraction]]
    right: Mapping[str, Sequence[bool]]


def pack(questions: Sequence[Question], students: Mapping[str, Mapping[str, Responses]]) -> str:
    """All of it as JSON, deflated, in base 64: of each student its runs, by name. Every run has the same readers."""
    experiments = {name: one for runs in students.values() for name, one in runs.items()}
    places = {name: place for place, name in enumerate(experiments)}
    readers = list(next(iter(experiments.values())).taken)
    rules = sorted({found.rule for one in experiments.values() for taken in one.taken.values() for found in taken})
    document = {
        "experiments": list(experiments),
        "students": [[student, [places[name] for name in runs]] for student, runs in students.items()],
        "readers": readers,
        "rules": rules,
        "questions": [[question.text, question.worked, question.truth] for question in questions],
        # Responses to one question stand together: they repeat it and each other, which compresses well.
        "responses": list(zip(*(one.texts for one in experiments.values()), strict=True)),
        "tokens": [list(one.tokens) for one in experiments.values()],
        "cut": ["".join("01"[cut] for cut in one.cut) for one in experiments.values()],
        "readings": [[_readings(one, reader, rules) for one in experiments.values()] for reader in readers],
    }
    text = json.dumps(document, separators=(",", ":"))  # ASCII: a response may hold a lone surrogate
    return base64.b64encode(zlib.compress(text.encode("ascii"), LEVEL)).decode("ascii")


def _readings(responses: Responses, reader: str, rules: Sequence[str]) -> dict[str, Any]:
    """What one reader took from one experiment's responses: answers, rules (places in `rules`), spans, verdicts."""
    taken, right = responses.taken[reader], responses.right[reader]
    places = {rule: place for place, rule in enumerate(rules)}
    return {
        "answers": [found.answer for found in taken],
        "rules": [places[found.rule] for found in taken],
        "spans": [_utf16(responses.texts, row, found) for row, found in enumerate(taken)],
        "back": {row: found.rows_back for row, found in enumerate(taken) if found.rows_back},
        "verdicts": "".join(_verdict(found, is_right) for found, is_right in zip(taken, right, strict=True)),
    }


def _verdict(found: Extraction, right: bool) -> str:
    """r(ight), w(rong) or u(ndecided)."""
    return "r" if right else "u" if found.rule == UNDECIDED else "w"


def _utf16(texts: Sequence[str], row: int, found: Extraction) -> tuple[int, int] | None:
    """The answer's place as JavaScript counts: in UTF-16 units, of which a character may take two."""
    text = texts[row - found.rows_back]
    if found.span is None or text.isascii():
        return found.span
    start, stop = (len(text[:place].encode("utf-16-le", "surrogatepass")) // 2 for place in found.span)
    return start, stop
