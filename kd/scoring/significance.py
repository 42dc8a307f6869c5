"""Statistics of results: intervals of each accuracy, and paired comparisons between experiments.

Textbook formulas over `scipy.special`: `scipy.stats` and statsmodels, which the tests compare with, take four seconds
to import, a third of the whole audit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import lcm, log, sqrt

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Two experiments on the same test rows.

    `difference` is accuracy(first) - accuracy(second) with its 95 % bootstrap `interval`; `only_first` and
    `only_second` count the rows that one of them alone has right; `p` is McNemar's exact p-value over those rows
    (two-sided) and `p_holm` the same after Holm's correction over the family compared at once.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    p_holm: float


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


def compare_pairs(correct: Mapping[str, Sequence[bool]], seed: int) -> list[Comparison]:
    """Every pair of experiments, whose `correct` tell for the same test rows in the same order who was right."""
    return _compare(list(combinations(correct, 2)), correct, seed)


def compare_with(control: str, correct: Mapping[str, Sequence[bool]], seed: int) -> list[Comparison]:
    """Every other experiment (`first`) against the control (`second`): a family of its own, as large as there are
    others."""
    return _compare([(name, control) for name in correct if name != control], correct, seed)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: of the rows where the two differ, each is as likely to favour one as the other."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def paired_differences(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """How far apart two experiments are on each test row, over all their seeds: integers (rows,), and their unit.

    `first` and `second` tell who was right, (seeds, rows), on the same rows. Where the numbers of seeds differ, each
    side counts as often as makes them equal, so that one run compares with three seeds. The difference in mean
    accuracy is the integers' mean divided by the unit.
    """
    runs = lcm(len(first), len(second))
    totals = [side.sum(axis=0, dtype=np.int64) * (runs // len(side)) for side in (first, second)]
    return totals[0] - totals[1], runs


def sign_flip_test(differences: NDArray[np.int64]) -> float:
    """The exact two-sided p-value of the sum of paired `differences` (rows,) where either sign is as likely.

    The unit is the row: a row's seeds share its difference, so more seeds make no more rows. With differences of -1, 0
    and 1, one run on each side, it is `mcnemar`.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    shares = np.ones(1)  # of all ways to choose signs: entry s has a positive part of sum s
    for size, count in zip(sizes, counts, strict=True):
        positive = np.zeros(size * count + 1)
        positive[::size] = _binomial(int(count))
        shares = np.convolve(shares, positive)
    total, observed = int(np.abs(differences).sum()), abs(int(differences.sum()))
    # A sum of -observed or less is a positive part of at most half of what observed leaves of the total.
    return min(1.0, 2 * float(shares[: (total - observed) // 2 + 1].sum()))


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


def bootstrap_interval(
    values: Sequence[int] | NDArray[np.int64], counts: Sequence[int] | NDArray[np.int64], random: np.random.Generator
) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over test rows drawn with replacement.

    `counts[i]` of the rows have `values[i]`. Such values are few, so drawing rows is drawing their counts from a
    multinomial.
    """
    rows = int(np.sum(counts))
    drawn = random.multinomial(rows, np.asarray(counts) / rows, size=RESAMPLES)
    low, high = np.percentile(drawn @ np.asarray(values) / rows, [2.5, 97.5])
    return float(low), float(high)


def _compare(pairs: Sequence[tuple[str, str]], correct: Mapping[str, Sequence[bool]], seed: int) -> list[Comparison]:
    """These pairs, as one family of tests."""
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
            _discordant_interval(*counts, len(correct[first]), random),
            *counts,
            p,
            p_holm,
        )
        for (first, second), counts, p, p_holm in zip(pairs, only, p_values, holm(p_values), strict=True)
    ]


def _discordant_interval(
    only_first: int, only_second: int, rows: int, random: np.random.Generator
) -> tuple[float, float]:
    """The bootstrap interval of a difference in accuracy, to which a row adds +1, -1 or 0."""
    return bootstrap_interval([1, -1, 0], [only_first, only_second, rows - only_first - only_second], random)


def _binomial(count: int) -> NDArray[np.float64]:
    """The probabilities of 0 to `count` heads among as many fair coins."""
    from scipy.special import gammaln

    heads = np.arange(count + 1)
    shares: NDArray[np.float64] = np.exp(
        gammaln(count + 1) - gammaln(heads + 1) - gammaln(count - heads + 1) - count * log(2)
    )
    return shares


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """How many rows only the first has right, and only the second."""
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
