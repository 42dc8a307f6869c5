"""Which part of a response is the model's answer: behind its thoughts, and before it goes on to something else."""

from __future__ import annotations

import re

from kd.scoring.rules.settle import TAKES_BACK

_DIGIT = re.compile("[0-9]")
_CHECKS = ("heck", "erif", "roof", "onfirm", "VERIF", "CHECK")  # most responses have none of these
_CHECK = re.compile(
    r"(?:^|(?<=[.!?]\s))[ \t*#_>(]*+(?:(?:let (?:us|me)|let's|to|now|we can|double[ -]?|sanity|quick)\s?)*+"
    r"(?:check(?:ing)?|verif(?:y|ication|ying)|proof|confirm(?:ation)?)\b(?:,|\.\s|[^.,\n]{0,40}?:|[*_ ]*+\n)",
    re.IGNORECASE | re.MULTILINE,
)
_DRAWING = re.compile(r"\[asy\]|\b(?:draw|label|fill|filldraw|pair)\s?\(")
_NOTE = re.compile(r"\s*+\([^()\n]*+\)\s*+")  # in brackets before the answer
# Another turn of a conversation, as chat templates mark it, and the end of the model's own turn.
_USER = re.compile(
    r"<\|im_start\|>\s*user|<\|start_header_id\|>\s*user|<start_of_turn>\s*user|<\|start\|>user|<\|user\|>|<\uff5cUser\uff5c>"
    r"|\[INST\]|<\|prompter\|>|<\|USER_TOKEN\|>",
    re.IGNORECASE,
)
_THOUGHT = re.compile(
    r"</(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reason|analysis|scratchpad|reflection)>|\[/(?:THINK|REASONING|THOUGHT)\]"
    r"|<\|channel\|>final<\|message\|>|<\|end_of_thought\|>|\u25c1/think\u25b7|<\|/think\|>|</\|think\|>",
    re.IGNORECASE,
)
_TURN_END = re.compile(
    r"<\|(?:im_end|eot_id|endoftext|end|eom_id|end_of_text|return|end_of_turn|END_OF_TURN_TOKEN|eot|assistant|im_start|start_header_id)\|>"
    r"|<(?:end_of_turn|eos|EOT|end|\uff5cend\u2581of\u2581sentence\uff5c|\uff5cAssistant\uff5c)>|</s>|\[EOS\]",
    re.IGNORECASE,
)
_QUESTION = (
    r"(?:here(?:'s| is) )?(?:next |new |another |follow-up |similar |example )?(?:question|problem|exercise)"
    r"(?: ?#?[0-9]++)?[*_]*+(?:[:.]|[ \t]*+\n)"
)
_ROLE = r"<?(?:human|user|student|system|instructions?|input|example [0-9]{1,2})>?[*_]*+(?::|(?<=[a-z])[ \t]*+\n)"
_NEXT_QUESTION = re.compile(
    rf"\n[ \t#*_>]*+(?:{_QUESTION}|q(?:[0-9]{{1,3}})?[*_]*+(?::|\.[*_]*+\s++[a-z]{{2}})|{_ROLE}"
    r"|<(?:question|problem|human|user)>)",
    re.IGNORECASE,
)


def own_part(response: str) -> tuple[int, int]:
    """Where the model's answer begins and ends: behind its last thought, up to the end of its turn, or to where it
    goes on to another question."""
    start, stop = 0, len(response)
    if "<" in response or "[" in response or "\u25c1" in response:
        start, stop = _own_turn(response)
    if "draw(" in response or "label(" in response:
        stop = _before_drawing(response, start, stop)
    note = _NOTE.match(response, start, stop)
    digit = _DIGIT.search(response, note.end() if note else start, stop)
    following = _NEXT_QUESTION.search(response, digit.end(), stop) if digit else None
    return start, following.start() if following else stop


def _before_drawing(response: str, start: int, stop: int) -> int:
    """Where drawing code begins that nothing follows: its numbers are no answers."""
    drawing = _DRAWING.search(response, start, stop)
    return drawing.start() if drawing and "[/asy]" not in response else stop


def _own_turn(response: str) -> tuple[int, int]:
    """The same by the marks of chat templates alone, those that stand before anything else aside."""
    stop = _first_inner(_USER, response, 0, len(response))
    start = max((thought.end() for thought in _THOUGHT.finditer(response, 0, stop)), default=0)
    return start, _first_inner(_TURN_END, response, start, stop)


def _first_inner(mark: re.Pattern[str], response: str, start: int, stop: int) -> int:
    """Where the first mark stands that has something before it."""
    for found in mark.finditer(response, start, stop):
        if not response[start : found.start()].isspace() and found.start() > start:
            return found.start()
    return stop


def before_check(response: str) -> int:
    """Where a check of the answer begins, if one follows it and does not take it back; else the end."""
    if not any(word in response for word in _CHECKS):
        return len(response)
    digit = _DIGIT.search(response)
    checks = [check for check in _CHECK.finditer(response) if digit and digit.start() < check.start()]
    if not checks:
        return len(response)
    taken_back = max((found.start() for found in TAKES_BACK.finditer(response, checks[0].end())), default=0)
    return next((check.start() for check in checks if taken_back < check.end()), len(response))
