"""What a rule and a rule set are.

A rule reads one response and finds a number or nothing. A rule set reads the responses of a log in their order and
says for each what its answer is and which rule took it; most are rules in order of precedence (`in_order`), but the
notebook's carries state from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

UNDECIDED = "undecided"


@dataclass(frozen=True)
class Found:
    """A number a rule took, in canonical spelling ("70000", "-3.5"), and where it stands: response[start:stop]."""

    answer: str
    start: int
    stop: int


@dataclass(frozen=True)
class Extraction:
    """A response's answer in canonical spelling, the rule that took it and where it stands; None where undecided.

    `span` is None too where a library does not say it. `rows_back` is 0 unless the answer stands in an earlier
    response of the log, that many rows before.
    """

    answer: str | None
    rule: str
    span: tuple[int, int] | None
    rows_back: int = 0


Rule = Callable[[str], Found | None]
RuleSet = Callable[[Iterable[str]], Iterator[Extraction]]

NOTHING = Extraction(None, UNDECIDED, None)


def in_order(rules: dict[str, Rule]) -> RuleSet:
    """The rule set that tries `rules` in order; the first that finds a number names the answer."""

    def rule_set(responses: Iterable[str]) -> Iterator[Extraction]:
        for response in responses:
            yield first(rules, response)

    return rule_set


def first(rules: dict[str, Rule], response: str, offset: int = 0) -> Extraction:
    """What the first of `rules` that finds a number takes from a response, or from the part of one at `offset`."""
    for name, rule in rules.items():
        found = rule(response)
        if found is not None:
            return Extraction(found.answer, name, (found.start + offset, found.stop + offset))
    return NOTHING
