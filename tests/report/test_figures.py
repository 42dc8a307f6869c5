"""Figures in a document are bound by name to the results they are of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kd.errors import UserError
from kd.report.figures import fill, unbound

RESULTS: dict[str, Any] = {
    "rows": {"test": 1319},
    "students": {"rate/base-kd": {"accuracy": 0.3456, "interval": [0.31, 0.38]}},
    "pairs": {"rate/a - rate/b": {"difference": -0.0123, "equivalent": True}},
}
DOCUMENT = """# Of an 8B student <!-- given: 8B, 2412.17846 -->

Of 1,319<!-- rows.test:,d --> questions it has 34.6%<!-- students.rate/base-kd.accuracy:.1% --> right
(31<!-- students.rate/base-kd.interval.0:.0p --> to 38%<!-- students.rate/base-kd.interval.1:.0% -->),
-1.2<!-- pairs.rate/a - rate/b.difference:+.1p --> points less (arXiv 2412.17846), SmolLM2-135M on an H100, in `3 + 4`.
"""


def test_a_document_that_is_right_stays_as_it_is() -> None:
    assert fill(DOCUMENT, RESULTS, "README.md") == DOCUMENT
    assert unbound(DOCUMENT) == []


def test_each_figure_that_is_changed_is_found() -> None:
    bound = [(match.start(), match[1]) for match in re.finditer(r"([^\s(]+)<!-- [^g]", DOCUMENT)]
    assert [figure for _, figure in bound] == ["1,319", "34.6%", "31", "38%", "-1.2"]
    for start, figure in bound:
        for place, digit in enumerate(figure):
            if digit.isdigit():
                wrong = f"{figure[:place]}{(int(digit) + 1) % 10}{figure[place + 1 :]}"
                spoiled = DOCUMENT[:start] + wrong + DOCUMENT[start + len(figure) :]
                assert fill(spoiled, RESULTS, "README.md") == DOCUMENT != spoiled


def test_a_figure_is_written_where_a_question_mark_stands() -> None:
    assert fill("?<!-- rows.test:d -->", RESULTS, "README.md") == "1319<!-- rows.test:d -->"


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("12 % of them", ["12 %"]),
        ("3e-05<!-- p:.1g -->", []),
        ("+1.5 points, 70B, 5-6 and 3rd.", ["+1.5", "70B", "5-6", "3rd"]),
        ("SmolLM2-135M, H100, `7`, [a](b-1.md), float32", []),
        ("<!-- table: students -->\n| 7 |\n<!-- end of table -->", []),
        ("```\n7\n```", []),
        ("1. one\n\n    kd audit --minutes 7", []),
        ("a figure lost its key: 34.6%", ["34.6%"]),
    ],
)
def test_figures_without_a_key_are_found(text: str, figures: list[str]) -> None:
    assert unbound(text) == figures


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("rows.train:d", "README.md: rows.train: the results have no 'train' there; mend the key"),
        ("rows.test.x:d", "the results have no 'x' there"),
        ("students.rate/base-kd.interval.2:.1%", "the results have no '2' there"),
        ("students.rate/base-kd:.1%", "'.1%' is no form of {"),
        ("rows.test:.1q", "'.1q' is no form of 1319"),
    ],
)
def test_a_key_that_is_not_there_is_named(mark: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        fill(f"1<!-- {mark} -->", RESULTS, "README.md")
    assert message in str(refused.value)
