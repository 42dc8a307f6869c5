"""Statistics of the results table: intervals of each accuracy, and paired comparisons between experiments.

Textbook formulas over `scipy.special`: `scipy.stats` and statsmodels, which the tests compare with, take four seconds
to import, a third of the whole audit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Two experiments on the same test rows.

    `difference` is accuracy(first) - accuracy(second) with its 95 % bootstrap `interval`; `only_first` and
    `only_second` count the rows that one of them alone has right; `p` is McNemar's exact p-value over those rows
    (two-sided) and `p_holm` the same after Holm's correction over all pairs compared.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    p_holm: float


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, both ends between 0 and 1."""
    from scipy.special import ndtri

    z, share = float(ndtri(0.975)), correct / rows
    middle = share + z**2 / (2 * rows)
    arm = z * sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    low, high = ((middle + side) / (1 + z**2 / rows) for side in (-arm, arm))
    return max(0.0, low), min(1.0, high)


def compare_pairs(correct: Mapping[str, Sequence[bool]], seed: int) -> list[Comparison]:
    """Every pair of experiments, whose `correct` tell for the same test rows in the same order who was right."""
    pairs = list(combinations(correct, 2))
    if not pairs:
        return []
    only = [_discordant(correct[first], correct[second]) for first, second in pairs]
    p_values = [mcnemar(*counts) for counts in only]
    random = np.random.default_rng(seed)
    return [
        Comparison(
            first,
            second,
            (counts[0] - counts[1]) / len(correct[first]),
            bootstrap_interval(*counts, len(correct[first]), random),
            *counts,
            p,
            p_holm,
        )
        for (first, second), counts, p, p_holm in zip(pairs, only, p_values, holm(p_values), strict=True)
    ]


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: of the rows where the two differ, each is as likely to favour one as the other."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values, in the same order, that hold for all tests at once."""
    p = np.asarray(p_values)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, stepped)
    return [float(value) for value in corrected]


def bootstrap_interval(
    only_first: int, only_second: int, rows: int, random: np.random.Generator
) -> tuple[float, float]:
    """The 95 % percentile interval of the difference in accuracy, over test rows drawn with replacement.

    A row adds +1, -1 or 0 to the difference, so drawing rows is drawing those three counts from a multinomial.
    """
    shares = np.array([only_first, only_second, rows - only_first - only_second]) / rows
    drawn = random.multinomial(rows, shares, size=RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / rows, [2.5, 97.5])
    return float(low), float(high)


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """How many rows only the first has right, and only the second."""
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
