"""Did a training loss rise, and did training make a student worse?"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kd.scoring.collapse import ended_worse, loss_ends

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


def curve(shape: list[float], scatter: float, seed: int = 0) -> list[float]:
    """Losses about `shape`, as batches of one scatter them."""
    draw = random.Random(seed)
    return [loss + draw.gauss(0, scatter) for loss in shape]


def test_a_student_is_worse_where_its_examples_are_by_more_than_their_scatter() -> None:
    before = curve([1.4] * 16, 0.5)
    assert ended_worse(before, [loss + 1 for loss in before]) == pytest.approx((sum(before) / 16, sum(before) / 16 + 1))
    assert ended_worse(before, curve(before, 0.1, seed=1)) is None
    assert ended_worse(before, [loss - 1 for loss in before]) is None
    assert ended_worse(before, before) is None
    assert ended_worse(before, [*before[1:], math.nan])
    assert ended_worse([1.4], [1.5]) == (1.4, 1.5)
