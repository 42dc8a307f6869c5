"""Did a training loss rise, and did training make a student worse?"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.scoring.collapse import ended_worse, loss_rose


def curve(shape: list[float], scatter: float, seed: int = 0) -> list[float]:
    """Losses about `shape`, as batches of one scatter them."""
    draw = random.Random(seed)
    return [loss + draw.gauss(0, scatter) for loss in shape]


def test_a_falling_and_a_steady_loss_have_not_risen() -> None:
    assert not loss_rose(curve([3 - step / 100 for step in range(128)], 0.5))
    risen = [seed for seed in range(300) if loss_rose(curve([3.0] * 128, 0.5, seed))]
    assert len(risen) <= 3  # though nothing but scatter


@pytest.mark.parametrize(
    "shape",
    [
        [3 + step / 100 for step in range(128)],  # slowly
        [3.0] * 100 + [8.0] * 28,  # late
        [3.0] * 8 + [8 - step / 100 for step in range(120)],  # at once, and then less bad
    ],
)
def test_a_rise_is_seen_whenever_it_came(shape: list[float]) -> None:
    for seed in range(20):
        rose = loss_rose(curve(shape, 0.4, seed))
        assert rose
        assert rose[0] < rose[1]


def test_a_loss_that_is_no_number_has_risen_to_it_and_a_short_curve_says_nothing() -> None:
    rose = loss_rose([3.0, 5.0, math.inf, math.nan])
    assert rose == (4.0, math.inf)
    assert loss_rose([math.nan])
    assert loss_rose([]) is None
    assert loss_rose([1.0, 9.0]) is None


@given(st.floats(-1e6, 1e6), st.integers(0, 100))
def test_a_constant_loss_has_not_risen(loss: float, length: int) -> None:
    assert loss_rose([loss] * length) is None


def test_a_student_is_worse_where_its_examples_are_by_more_than_their_scatter() -> None:
    before = curve([1.4] * 16, 0.5)
    assert ended_worse(before, [loss + 1 for loss in before]) == pytest.approx((sum(before) / 16, sum(before) / 16 + 1))
    assert ended_worse(before, curve(before, 0.1, seed=1)) is None
    assert ended_worse(before, [loss - 1 for loss in before]) is None
    assert ended_worse(before, before) is None
    assert ended_worse(before, [*before[1:], math.nan])
    assert ended_worse([1.4], [1.5]) == (1.4, 1.5)
