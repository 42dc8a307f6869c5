"""Two students compared over their seeds and over the questions, which both answer.

A run is a student trained with one seed and asked every question. Seeds are drawn for each student, questions once for
all: readers and cases of a split-plot study, whose variances radiologists have worked out (Obuchowski and Rockette
1995, Hillis 2014; for right and wrong Gallas, Pennello and Myers 2007; for questions alone arXiv 2411.00640).

Of student A let x[s, q] be 1 where seed s of m is right on question q of Q: a mean, and effects of the seed, of the
question, and of both together, with variances a, b and e. For the difference d[q] of two students' means over their
seeds,

    Var(mean d) = (a + e/Q)/m + the same of B + (b of the difference)/Q

The variance S of a student's seed means is (a + e/Q) on average, and the variance of d over the questions is that of
the difference b with e/m of both students in it. Adding both would count e twice, so it is taken out once, as E, the
mean square of what seed and question do not explain (as in a two-way analysis of variance; b is not below zero):

    V = S_A/m_A + S_B/m_B + max(0, (Var(d) - E_A/m_A - E_B/m_B) / Q)

The difference divided by the root of V is referred to Student's t with Satterthwaite's degrees of freedom. Where
questions vary nothing it is Welch's test of the seeds' accuracies; where seeds vary nothing, the paired test of the
questions. A seed that collapsed is one of the seeds: it makes S large, and the student hard to tell from others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.scoring.significance import holm, mcnemar, score_interval, wilson_interval

LEVEL, POWER = 0.05, 0.8
MARGIN = 0.05  # a difference in accuracy that matters: five points
# Who was right: (seeds, questions); (questions,) of a student that nobody trained, which has no seed.
Right = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """The difference in mean accuracy of two students, as shares, with its 95 % and 90 % intervals.

    `p` is two-sided, `p_holm` the same after Holm's correction over the family it belongs to. `detectable` is the
    smallest difference that data of this variance shows with 80 % power, at the level that Holm's correction asks of
    the first of the family; above 1, none is. `only_first` and `only_second` are the questions that one alone has
    right, on average over the pairs of runs. `covers_seeds`: whether p and intervals speak of other seeds; not where a
    trained student has one run.
    """

    difference: float
    standard_error: float
    interval: Interval
    interval_90: Interval
    p: float
    p_holm: float
    detectable: float
    only_first: float
    only_second: float
    covers_seeds: bool

    def excludes(self, margin: float) -> bool:
        """Whether a difference of `margin` or more, either way, is excluded: two one-sided tests at 5 %."""
        return max(map(abs, self.interval_90)) < margin


@dataclass(frozen=True)
class _Seeds:
    """What a student's seeds add to a variance: `weight` (one by their number) times `spread`, that of their
    accuracies; `unexplained` is E, and `freedom` belongs to the spread."""

    weight: float
    spread: float
    unexplained: float
    freedom: int


def compare_runs(first: Right, second: Right, tests: int = 1) -> Difference:
    """The accuracy of `first` less that of `second`, on the same questions in the same order.

    With one run a side p is McNemar's exact test and the intervals are Bonett and Price's (2012). Of one seed against
    several the one is taken to vary as the several do. `tests` is the size of the family.
    """
    from scipy.special import nctdtrinc, stdtr

    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"{first.shape[-1]} and {second.shape[-1]} questions, expected the same")
    runs = [np.atleast_2d(side) for side in (first, second)]
    shares = [side.mean(axis=0) for side in runs]
    only = float(shares[0] @ (1 - shares[1])), float(shares[1] @ (1 - shares[0]))
    difference = centre = float(runs[0].mean() - runs[1].mean())
    if len(runs[0]) == len(runs[1]) == 1:
        differing = round(only[0]), round(only[1])
        centre, error, freedom = *_of_single_runs(*differing, len(shares[0])), inf
        p, detectable = mcnemar(*differing), _detectable(sum(differing), len(shares[0]), tests)
    else:
        variance, freedom = _variance(shares[0] - shares[1], _seeds(first, second))
        error = sqrt(variance)
        p = 2 * float(stdtr(freedom, -abs(difference) / error))
        # Where a noncentral t exceeds the critical value as often as POWER says.
        detectable = error * float(nctdtrinc(freedom, 1 - POWER, _critical(tests, freedom)))
    interval, interval_90 = (
        (max(-1.0, centre - arm), min(1.0, centre + arm))
        for arm in (error * _quantile(0.975, freedom), error * _quantile(0.95, freedom))
    )
    covers_seeds = all(side.ndim == 1 or len(side) > 1 for side in (first, second))
    return Difference(difference, error, interval, interval_90, p, p, detectable, *only, covers_seeds)


def compare_family(pairs: Iterable[tuple[str, str]], right: Mapping[str, Right]) -> dict[tuple[str, str], Difference]:
    """These pairs of students, as one family of tests."""
    names = list(pairs)
    found = [compare_runs(right[first], right[second], len(names)) for first, second in names]
    corrected = holm([one.p for one in found])
    return {pair: replace(one, p_holm=p) for pair, one, p in zip(names, found, corrected, strict=True)}


def as_rows(family: Mapping[tuple[str, str], Difference], margin: float = MARGIN) -> list[dict[str, Any]]:
    """The comparisons of a family for a document, each with both names and whether one of `margin` is `excluded`."""
    return [
        {"first": first, "second": second, **asdict(one), "excluded": one.excludes(margin)}
        for (first, second), one in family.items()
    ]


def accuracy_interval(right: Right) -> Interval:
    """The 95 % interval of a student's mean accuracy, over seeds and questions; of one run over questions alone.

    Wilson's, of as many independent questions as would give the mean this variance, with Student's t for the normal
    quantile (as for surveys with clusters: Dean and Pacheco 2014).
    """
    runs = np.atleast_2d(right)
    share, (seeds, questions) = float(runs.mean()), runs.shape
    if seeds == 1 or share in (0, 1):
        return wilson_interval(share * questions, questions)
    variance, freedom = _variance(runs.mean(axis=0), _seeds(right))
    independent = min(share * (1 - share) / variance, seeds * questions)
    return score_interval(share, independent, _quantile(0.975, freedom))


def _of_single_runs(only_first: int, only_second: int, questions: int) -> tuple[float, float]:
    """The centre of Bonett and Price's intervals and its standard error: two questions more, of which each run alone
    has one right."""
    shares = (only_first + 1) / (questions + 2), (only_second + 1) / (questions + 2)
    centre = shares[0] - shares[1]
    return centre, sqrt((sum(shares) - centre**2) / (questions + 2))


def _detectable(differing: int, questions: int, tests: int) -> float:
    """The difference that McNemar's test shows with 80 % power where single runs differ on so many questions (Connor
    1987, whose errors are taken as equal); they differ on no fewer than such a difference itself takes."""
    quantiles = _critical(tests, inf) + _quantile(POWER, inf)
    return quantiles * sqrt(max(differing, quantiles**2)) / questions


def _seeds(*students: Right) -> list[_Seeds]:
    """The seeds of each of the students that has several; one seed counts among those of the other student."""
    drawn = [side for side in students if side.ndim == 2]
    singles = sum(len(side) == 1 for side in drawn)
    return [_Seeds(1 / len(side) + singles, *_mean_squares(side), len(side) - 1) for side in drawn if len(side) > 1]


def _mean_squares(right: Right) -> tuple[float, float]:
    """The variance of the seeds' accuracies, and the mean square of what neither seed nor question explains."""
    seeds, questions = right.shape
    spread = float(right.mean(axis=1).var(ddof=1))
    by_question = right.mean(axis=0)
    # Of zeros and ones the squares around a question's mean sum up to this.
    within = seeds * float(by_question @ (1 - by_question))
    return spread, (within - questions * (seeds - 1) * spread) / ((seeds - 1) * max(1, questions - 1))


def _variance(by_question: NDArray[np.float64], seeds: Sequence[_Seeds]) -> tuple[float, float]:
    """The variance V of the mean of what each question has, and its degrees of freedom.

    Never less than one question that differs would give: where all runs of both students are alike, no variance at all
    would be found.
    """
    questions = len(by_question)
    freedom = max(1, questions - 1)
    terms = [(one.weight * one.spread, one.freedom) for one in seeds]
    asked = [(float(by_question.var()) / freedom, freedom)]
    asked += [(-one.weight * one.unexplained / questions, one.freedom * freedom) for one in seeds]
    if sum(term for term, _ in asked) > 0:
        terms += asked
    variance = sum(term for term, _ in terms)
    if variance < 1 / questions**2:
        return 1 / questions**2, freedom
    return variance, variance**2 / sum(term**2 / of for term, of in terms)


def _critical(tests: int, freedom: float) -> float:
    """What t must exceed at the level that Holm's correction asks of the first of so many tests."""
    return _quantile(1 - LEVEL / 2 / tests, freedom)


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t; the normal one at infinite degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(freedom, share) if isfinite(freedom) else ndtri(share))
