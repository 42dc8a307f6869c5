"""Intervals of shares, and tests.

Textbook formulas over `scipy.special`: `scipy.stats` and statsmodels, which the tests compare with, take four seconds
to import, a third of the whole audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np


def wilson_interval(correct: float, rows: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, both ends between 0 and 1.

    `correct` may be a mean over seeds: the interval then tells of other questions, which more seeds do not add.
    """
    from scipy.special import ndtri

    return score_interval(correct / rows, rows, float(ndtri(0.975)))


def score_interval(share: float, rows: float, quantile: float) -> tuple[float, float]:
    """The same of a share of so many independent rows, at a quantile of the distribution that its error has."""
    middle = share + quantile**2 / (2 * rows)
    arm = quantile * sqrt(share * (1 - share) / rows + quantile**2 / (4 * rows**2))
    low, high = ((middle + side) / (1 + quantile**2 / rows) for side in (-arm, arm))
    return max(0.0, low), min(1.0, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: of the rows where the two differ, each is as likely to favour one as the other."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def rank_sum_test(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Wilcoxon's rank-sum test (Mann and Whitney's), one-sided: the p-value of `higher` being that much above `lower`
    by chance alone.

    By the normal approximation, without corrections. It asks for ranks alone, so an outlier weighs no more than another
    value and neither side has to be normal.
    """
    from scipy.special import ndtr

    some, others = np.sort(np.asarray(higher, dtype=float)), np.sort(np.asarray(lower, dtype=float))
    m, n = len(some), len(others)
    # Of all pairs, those in which `higher` has the higher value; a tie is half of one.
    won = (np.searchsorted(others, some, "left").sum() + np.searchsorted(others, some, "right").sum()) / 2
    return float(ndtr(-(won - m * n / 2) / sqrt(m * n * (m + n + 1) / 12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values, in the same order, that hold for all tests at once."""
    p = np.asarray(p_values)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, stepped)
    return [float(value) for value in corrected]
