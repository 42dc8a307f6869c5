"""Whether training made a student worse: told from the curve of its training loss, or from what others judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite, nan, sqrt
from statistics import fmean, mean, median, stdev
from typing import Any

from kd.scoring.significance import rank_sum_test

FIRST = 10  # updates that are the beginning of a loss curve: one that diverges does it soon after them
CHANCE = 0.002  # how often noise alone may pass for a rise
ERRORS = 3  # standard errors that examples must have become worse by


def loss_ends(losses: Sequence[float]) -> dict[str, Any]:
    """Both ends of a loss curve, one loss an update: the medians of its `first` ten updates and of its `last` quarter,
    and whether it `rose` between them.

    It rose where the last quarter ranks above the first ten (rank sums) by more than noise does in one of 500 curves
    that are flat. The beginning is short because a student that diverges is lost after a dozen updates, of however
    many. With batches of one the loss differs so much from example to example that a rise by less than about its
    standard deviation is not told from noise. A curve of fewer than 20 updates is halved; one of fewer than 12 is never
    called risen.
    """
    beginning = losses[: min(FIRST, ceil(len(losses) / 2))]
    end = losses[-max(len(beginning), len(losses) // 4) :]
    rose = rank_sum_test(end, beginning) < CHANCE
    return {"first": median(beginning), "last": median(end), "rose": rose}


def ended_worse(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The mean losses before and after training, or None where training did not make them worse.

    Both are of the same examples in the same order, so what counts is how far the single ones moved. Worse is what
    exceeds their scatter, or is no finite number.
    """
    if not all(map(isfinite, after)):
        return fmean(before), nan
    moved = [end - start for start, end in zip(before, after, strict=True)]
    error = stdev(moved) / sqrt(len(moved)) if len(moved) > 1 else 0.0
    return (fmean(before), fmean(after)) if mean(moved) > ERRORS * error else None
