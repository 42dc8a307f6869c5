"""The answer a careful reader takes from a response, whatever model wrote it and however it was cut off.

In order: an answer's tag; a box; a number behind "####"; what a sentence behind "the answer is", "Answer:" or another
label gives; an answer the response opens with, before it goes on to details; the number nearest the end, or in the last
sentence what was just worked out. A later box or label counts where the text takes the earlier one back.

What part of a response is its own answer is `part`'s to say, what labels one `label`'s, what a quantity is
`quantity`'s, which of a sentence's quantities it gives `sentence`'s, and which of several answers counts `settle`'s.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator

from kd.scoring.rules.arithmetic import arithmetic, calculated, evaluated, result_before
from kd.scoring.rules.label import behind_lead, labels
from kd.scoring.rules.part import before_check, own_part
from kd.scoring.rules.quantity import VULGAR, quantities
from kd.scoring.rules.rule import Extraction, Found, Rule, first
from kd.scoring.rules.sentence import (
    SENTENCE_LENGTH,
    concluded,
    counted,
    finished,
    is_label,
    restates,
    sentence_start,
    stated,
)
from kd.scoring.rules.settle import Reading, settled
from kd.scoring.rules.words import spelled_out

BOX_LENGTH = 200  # longer contents are no answer, and a limit keeps unclosed boxes cheap
NUMBER_LENGTH = 40
RESULT_LENGTH = 400  # how far back a result may stand that a sentence states again

_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{")
_BRACE = re.compile(r"[{}]")
_DIGIT = re.compile(f"[0-9{''.join(VULGAR)}]")
_HASHES = re.compile(rf"(?<!#)####(?!#)[^\n]{{0,{SENTENCE_LENGTH}}}")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s?\{[^{}]*+\}")
_TAG = re.compile(r"(?i:<(?:final[_-]?answer|answer|ans|final|result)>)|\[ANSWER\]|<\|begin_of_solution\|>")
_TAG_END = re.compile(r"</|\[/ANSWER\]|<\|end_of_solution\|>", re.IGNORECASE)
_WORKING = re.compile(r"=|\bsteps?\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{2}|=")
# What stands behind an opening number that is a whole answer: the end, a unit and the end, or a new sentence.
_WHOLE = re.compile(
    r"[$%\"'\u00a2\u20ac\u00a3}*]*+"
    r"(?:\s++(?=[A-Z][a-z])|(?:[^\S\n]?[^\W\d]++(?:/[^\W\d]++)?){0,4}+[*$]*+(?:[.!]++(?:[\s*]|\Z)|[^\S\n]*+(?:\n|\Z)))"
)
_WORKED = re.compile(r"\bstep\s*+[0-9]|^[ \t]*+[12][.)][ \t]", re.IGNORECASE | re.MULTILINE)
_EXPLAINED = re.compile(r"\b(?:explanation|reasoning|solution|breakdown|here.?s (?:how|why))\b", re.IGNORECASE)
# Of a line behind "####": a label, and a unit and the end.
_TOTAL = re.compile(
    r"[\s*]*+(?:the )?(?:final |correct )?(?:answer|ans|result|total)\b[*\s]*+(?:is\b|[:=]|)[*\s]*+", re.IGNORECASE
)
_UNIT_END = re.compile(r"[\s$%)\]}*\\]*+(?:[^\W\d]++[\s*)/]*+){0,4}+[.!]?[\s*]*+\Z")
# What begins the sentence that says how the one before came about.
_IS_HOW = r"(?:'s|\u2019s| is| are) (?:how|why|because\b|(?:the|a|my) (?:work|break|step|calc|reason|explan|detail)\w*)"
_DETAILS = re.compile(
    rf"(?:[.!?:]\s|\n)[\s*#_>]*+(?:in detail|(?:here|this|that){_IS_HOW}|why(?: is (?:that|this))?\?|how(?: so)?\?"
    r"|because\b|let me explain|to explain\b|(?:to )?see (?:why|how|this)|explanation\b|justification\b|reasoning\b"
    r"|(?:the )?reason[*_]*+:|(?:the |my |cost |step-by-step )?(?:breakdown|details|workings?|steps|calculations?"
    r"|solution|explanation)(?: (?:is|are))?(?: as follows)?[*_ ]*+:)",
    re.IGNORECASE,
)


def robust(responses: Iterable[str]) -> Iterator[Extraction]:
    """Extract every response by this module's rules, each from its own part alone."""
    for response in responses:
        start, stop = own_part(response)
        yield first(RULES, response[start:stop], start)


def answer_tag(response: str) -> Found | None:
    """What the last <answer> holds: a sentence's answer, or the last number of more."""
    if "<" not in response and "[" not in response:
        return None
    start = max((tag.end() for tag in _TAG.finditer(response)), default=None)
    if start is None:
        return None
    end = _TAG_END.search(response, start)
    stop = end.start() if end else len(response)
    start = behind_lead(response, start)
    if stop - start > SENTENCE_LENGTH or "\n" in response[start:stop].strip():
        return next(iter(deque(counted(response, start, stop), maxlen=1)), None)
    return _said(response, start, stop, start)


def boxed(response: str) -> Found | None:
    """The first \\boxed{} that holds one value, arithmetic or an equation, or one that takes it back."""
    boxes = []
    for opening in _BOX.finditer(response):
        stop = _closing_brace(response, opening.end())
        value = _one_value(response, opening.end(), stop) if stop is not None else None
        if value:
            boxes.append(Reading(value, opening.start(), stop or 0))
    return settled(response, boxes)


def hash_marks(response: str) -> Found | None:
    """What stands behind "####", GSM8K's own mark: a quantity with no more than a unit, arithmetic or a total. Where
    "####" marks headings, the last one that nothing follows."""
    lines = list(_HASHES.finditer(response)) if "####" in response else []
    if not lines:
        return None
    for line in lines:
        found = _marked(response, line, line is lines[-1])
        if found:
            return found
    start, stop = lines[-1].start() + 4, lines[-1].end()
    return None if _DIGIT.search(response, stop) else _said(response, start, stop, start)


def _marked(response: str, line: re.Match[str], last: bool) -> Found | None:
    """The quantity that stands alone on a line behind "####"; on the last such line it may have a unit, where no more
    working follows."""
    start, stop = line.start() + 4, line.end()
    begins = _skip(_TOTAL, response, start)
    values = list(quantities(response, begins, stop))
    if not values or is_label(response, values[0]) or response[begins : values[0].start].strip("*$ \\({[-"):
        return None
    found = calculated(response, begins, values)
    if not response[found.stop : stop].strip("$*.%)}] \\"):
        return found
    labelled = begins > start + 1
    with_unit = last and _UNIT_END.match(response[found.stop : stop]) and (labelled or "=" not in response[stop:])
    return found if with_unit else None


def answer_marker(response: str) -> Found | None:
    """What the rest of the sentence behind "the answer is", "Answer:" or another label gives."""
    named = labels(response)
    end = before_check(response) if named else 0
    working = (
        max((found.start() for found in _WORKING.finditer(response, named[0].end, end)), default=0) if named else 0
    )
    readings = []
    for label in named:
        if label.colon and end <= label.start < end + NUMBER_LENGTH:
            continue  # "To check our answer:"
        value = _said(response, label.end, label.stop, label.start)
        # An outcome, or "Answer:" and then no number, may stand before working instead.
        bare = value and not label.outcome and not (label.colon and _WORD.search(response, label.end, value.stop))
        if value and (bare or working < label.stop):
            readings.append(Reading(value, label.start, label.stop))
    return settled(response, readings)


def opening(response: str) -> Found | None:
    """A number, perhaps with a unit, that the response opens with, unless steps follow that work out another."""
    start = behind_lead(response, 0)
    value = next(quantities(response, start, start + NUMBER_LENGTH), None)
    if value is None or response[start : value.start].strip("$*( ") or "* " in response[: value.start]:
        return None  # words come first, or it is an item of a list
    if is_label(response, value) and "*" in response[: value.stop + 3]:
        return None
    worked = _WORKED.search(response, value.start)
    if worked and not _EXPLAINED.search(response, value.stop, max(value.stop, worked.start())):
        return None
    again = next(quantities(response, value.stop, value.stop + NUMBER_LENGTH), value)
    said_twice = again.answer == value.answer and not response[value.stop : again.start].strip("$ ")
    return value if _WHOLE.match(response, again.stop if said_twice else value.stop) else None


def before_details(response: str) -> Found | None:
    """What the first sentence gives, where the next says that now comes how."""
    details = _DETAILS.search(response, 0, SENTENCE_LENGTH)
    if not details or "=" in response[: details.start()]:
        return None
    end = finished(response, 0, details.start() + 1)
    return None if end and end.end() < details.start() else stated(response, 0, details.start())


def last_number(response: str) -> Found | None:
    """The number nearest the end that is no label and in no check; in a finished sentence, what that concludes."""
    end = start = before_check(response)
    spelled = next(iter(deque(_spelled_at_the_end(response[:end]), maxlen=1)), None)
    if spelled and not response[spelled.stop : end].strip(" .!*_\n"):
        return spelled
    for digit in _DIGIT.finditer(response[:end][::-1]):
        at = end - digit.end()
        if at < start:
            stop, start = start, sentence_start(response, at)
            full_stop = finished(response, at + 1, end)
            near = start if full_stop else max(start, response.rfind(" ", start, max(start, at - NUMBER_LENGTH)))
            values = list(counted(response, near, stop)) or list(counted(response, start, stop))
            if values:
                return _of_its_sentence(response, start, values, full_stop, end)
    return spelled


def _of_its_sentence(
    response: str, start: int, values: list[Found], full_stop: re.Match[str] | None, end: int
) -> Found:
    """What the sentence from `start` concludes that has the last `values`, if it is finished; else its last number."""
    if not full_stop:
        return values[-1]
    result = result_before(response, max(0, start - RESULT_LENGTH), full_stop.start())
    last = not response[full_stop.end() : end].strip(" \n\t*_)\"'")
    return concluded(response, start, values, result, last)


def _spelled_at_the_end(response: str) -> Iterator[Found]:
    """The numbers in words of the last sentence, if that is finished, or of a response that is not much else."""
    text = response.rstrip()
    if text.endswith((".", "!")):
        yield from spelled_out(response, sentence_start(response, len(text) - 1), len(text))
    elif len(text) < NUMBER_LENGTH:
        yield from spelled_out(response, 0, len(text))


def _said(response: str, start: int, stop: int, since: int) -> Found | None:
    """What a sentence response[start:stop] says, in figures or words, with the text before `since` in mind."""
    if response[start:stop].isspace():
        return None
    value = stated(response, start, stop, result_before(response, max(0, since - RESULT_LENGTH), since))
    spelled = (value for value in spelled_out(response, start, stop) if not restates(response, start, value))
    return value or next(spelled, None)


def _skip(pattern: re.Pattern[str], response: str, start: int) -> int:
    """Where what `pattern` matches at `start`, perhaps nothing, ends."""
    match = pattern.match(response, start)
    return match.end() if match else start


def _closing_brace(response: str, start: int) -> int | None:
    """Where the brace opened before `start` closes, if it does within a box's length."""
    depth = 1
    for brace in _BRACE.finditer(response, start, start + BOX_LENGTH):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def _one_value(response: str, start: int, stop: int) -> Found | None:
    """The one value of a box's contents, words aside; None where there is none or several."""
    words = [match.span() for match in _WORDS.finditer(response, start, stop)]
    every = list(quantities(response, start - 1, stop))
    values = [value for value in every if not any(a <= value.start < b for a, b in words)] or every
    if not values:
        return next(spelled_out(response, start, stop), None)
    found, used = arithmetic(response, start, values)
    if used == len(values):
        return found or evaluated(response, start, values)
    equals = response.rfind("=", start, stop)
    values = [value for value in values if value.start > equals]
    return values[0] if len({value.answer for value in values}) == 1 else None


RULES: dict[str, Rule] = {
    "answer-tag": answer_tag,
    "boxed": boxed,
    "hash-marks": hash_marks,
    "answer-marker": answer_marker,
    "opening": opening,
    "before-details": before_details,
    "last-number": last_number,
}
