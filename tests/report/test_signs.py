"""What is called collapsed: a loss that rose, no end, one response to everything."""

from __future__ import annotations

from typing import Any

import pytest

from kd.report.signs import count_alike, in_words, signs


def result(**other: Any) -> dict[str, Any]:
    return {"rows": 100, "loss": None, "at_limit": 0, "same": 1, "empty": 0} | other


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (result(), []),
        (result(at_limit=94), []),
        (result(at_limit=95), ["95 of 100 responses ran into the limit"]),
        (result(same=99, empty=3), ["99 of 100 responses are one and the same"]),
        (result(same=99, empty=99), ["99 of 100 responses are empty"]),
        (result(rows=1, same=1), []),
        (result(loss={"first": 9.0, "last": 2.0, "rose": False}), []),
        (
            result(loss={"first": 1.234, "last": 10.26, "rose": True}, at_limit=100),
            ["its training loss rose from 1.23 to 10.3", "100 of 100 responses ran into the limit"],
        ),
    ],
)
def test_signs_in_words(found: dict[str, Any], said: list[str]) -> None:
    assert [in_words(sign, found["rows"]) for sign in signs(found)] == said


def test_responses_are_alike_but_for_white_space() -> None:
    assert count_alike(["a", " a\n", "b", "", " "]) == (2, 2)
    assert count_alike(["x"]) == (1, 0)
