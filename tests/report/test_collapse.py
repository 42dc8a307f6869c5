"""What is called collapsed: a loss that rose and not one that is noisy, no end, one response to everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kd.report.collapse import count_alike, in_words, loss_ends, signs

# One epoch of the miniature, batches of one, labels alone, SGD: at 0.1 it learns, at 0.3 it is lost after ten updates.
LEARNS = (
    "1.01 .984 1.34 1.04 1.23 .939 1.51 .732 1.46 .621 .577 1.66 .191 .407 .604 .998 .778 .623 .935 .572 1.47 .751 "
    ".726 1.03 1.31 .955 .477 .84 1.43 .679 1.16 .474 .551 .518 .547 .556 .543 .895 .823 1.31 .686 .213 .593 .258 .276 "
    ".506 .946 .391 1.14 .572 .488 .165 .201 .239 .193 .358 .997 .423 .506 .603 .226 .181 .823 .415"
)
LOST = (
    "1.01 .946 1.2 .808 1.14 .902 1.44 .416 1.43 .635 1.52 4.55 8.76 9.47 9.58 8.82 30.5 20.2 63.9 245 48.8 18.5 18.6 "
    "17.6 15 14 13.9 15.2 13.9 11.8 15.1 11 11.7 10.5 10.4 9.48 10.2 10.8 9.14 8.84 10.3 11.9 17.3 11.8 10.5 10.2 11.2 "
    "11.8 10.6 9.98 9.99 11.8 11.4 10.2 10.5 10.9 9.29 8.05 8.5 9.53 13 9.44 8.94 12.7"
)


def losses(text: str) -> list[float]:
    return [float(loss) for loss in text.split()]


def test_a_run_that_learns_and_a_run_that_is_lost() -> None:
    assert loss_ends(losses(LEARNS)) == {"first": pytest.approx(1.025), "last": pytest.approx(0.419), "rose": False}
    assert loss_ends(losses(LOST)) == {"first": pytest.approx(0.978), "last": pytest.approx(10.095), "rose": True}
    first_epoch = losses(LEARNS)
    assert loss_ends(first_epoch + [9.0] * 5000)["rose"]  # however long it goes on


@pytest.mark.parametrize("updates", [1, 8, 12, 24, 64, 500])
def test_noise_is_no_rise(updates: int) -> None:
    random = np.random.default_rng(updates)
    flat = [random.choice(losses(LEARNS)[:32], updates).tolist() for _ in range(300)]  # as single examples differ
    assert sum(loss_ends(one)["rose"] for one in flat) <= 3


@pytest.mark.parametrize("updates", [16, 24, 64, 500])
def test_a_rise_stands_out_of_noise(updates: int) -> None:
    random = np.random.default_rng(updates)
    slope = np.linspace(2, 8, updates)
    for _ in range(20):
        assert loss_ends((slope + random.normal(0, 0.5, updates)).tolist())["rose"]
        assert not loss_ends((slope[::-1] + random.normal(0, 0.5, updates)).tolist())["rose"]


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
