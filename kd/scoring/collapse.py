"""Whether training made a student worse: told from the curve of its training loss, or from what others judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan, sqrt
from statistics import fmean, mean, stdev

SHORTEST = 8  # losses in a mean: fewer say nothing where an update is of one example
ERRORS = 3  # standard errors that a rise must exceed: of losses that only scatter one in hundreds does, more of a few


def loss_rose(losses: Sequence[float]) -> tuple[float, float] | None:
    """The means that a training loss rose from and to, or None where it did not rise, or is too short to tell.

    `losses` are one run's, an update each, in order. The last quarter is compared with the first, which shows a slow
    rise, and with the first few losses, which are still an untrained student's and show one that came at once. A rise
    is what exceeds the scatter of single losses. A loss that is no finite number has risen, to that number.
    """
    for number, loss in enumerate(losses):
        if not isfinite(loss):
            return mean(losses[: min(number, SHORTEST)] or [nan]), loss
    if len(losses) < 2 * SHORTEST:
        return None
    quarter = max(SHORTEST, len(losses) // 4)
    last = losses[-quarter:]
    for count in (quarter, SHORTEST):
        first = losses[:count]
        # The larger scatter of the two: so few losses may lie close together by chance.
        error = max(stdev(first), stdev(last)) * sqrt(1 / count + 1 / quarter)
        if mean(last) - mean(first) > ERRORS * error:
            return mean(first), mean(last)
    return None


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
