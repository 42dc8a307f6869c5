"""Two students compared over seeds and questions: special cases that textbooks know, and simulated studies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import sqrt
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from kd.scoring.comparison import MARGIN, accuracy_interval, as_rows, compare_family, compare_runs
from kd.scoring.significance import holm, mcnemar, wilson_interval

Right = NDArray[np.bool_]
TRIALS = 1000


def rows(*runs: str) -> Right:
    """Runs written as digits: 1 for a question that is right."""
    return np.array([[digit == "1" for digit in run] for run in runs])


def discordant(only_first: int, only_second: int, alike: int) -> tuple[Right, Right]:
    """Two runs of one seed each, by how many questions one of them alone has right."""
    first = np.repeat([True, False, True], [only_first, only_second, alike])
    return first[None], np.repeat([False, True, True], [only_first, only_second, alike])[None]


def test_seeds_and_questions_by_hand() -> None:
    """Accuracies 0.5 and 0.75 against 0 and 0.25: S = 1/32 and E = 1/10 on either side, Var(d) = 2/15; so V is
    (1/32 + 1/32)/2 + (2/15 - 1/10)/16 = 1/30."""
    found = compare_runs(rows("1100" * 4, "1110" * 4), rows("0000" * 4, "1000" * 4))
    freedom = (1 / 30) ** 2 / (2 / 64**2 + ((2 / 15 / 16) ** 2 + 2 * (1 / 20 / 16) ** 2 / 1) / 15)
    assert found.difference == 0.5
    assert found.p == pytest.approx(2 * stats.t.sf(0.5 * sqrt(30), freedom))
    arm = stats.t.ppf(0.975, freedom) / sqrt(30)
    assert found.interval == pytest.approx((0.5 - arm, min(1, 0.5 + arm)))
    assert (found.only_first, found.only_second) == (8, 0)
    assert found.covers_seeds


def students(seeds: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Right, Right]]:
    def make(given: tuple[int, int, int]) -> tuple[Right, Right]:
        random = np.random.default_rng(given[2])
        difficulty = random.random(30)
        first, second = (random.random((runs, 30)) < difficulty for runs in given[:2])
        return first, second

    return st.tuples(seeds, seeds, st.integers(0, 2**32)).map(make)


def variance_by_pairs(first: Right, second: Right) -> float:
    """The variance of a difference without any model (Gallas 2006): the square of it, less an unbiased estimate of its
    mean's square, of all pairs of answers that share neither a seed nor a question."""

    def product(one: Right, other: Right, *, same: bool) -> float:
        runs, questions = len(one), one.shape[1]
        products = np.einsum("sq,tp->stqp", one.astype(float), other.astype(float))
        apart = np.ones((runs, len(other)), bool) ^ (np.eye(runs, dtype=bool) if same else False)
        return float(products[apart][:, ~np.eye(questions, dtype=bool)].mean())

    mean = (
        product(first, first, same=True) + product(second, second, same=True) - 2 * product(first, second, same=False)
    )
    return float((first.mean() - second.mean()) ** 2 - mean)


@given(students(st.integers(2, 4)))
def test_the_variance_is_that_of_pairs_of_answers_which_share_nothing(given: tuple[Right, Right]) -> None:
    variance = variance_by_pairs(*given)
    seeds = sum(side.mean(axis=1).var(ddof=1) / len(side) for side in given)
    assume(variance > max(seeds, 1 / 30**2))  # the questions' part is not below zero
    assert compare_runs(*given).standard_error == pytest.approx(sqrt(variance))


def test_where_questions_vary_nothing_it_is_welchs_test_of_the_seeds() -> None:
    first = rows("1111111111", "1111111111", "0000000000", "1111111111")
    second = rows("0000000000", "0000000000", "1111111111")
    known = stats.ttest_ind(first.mean(axis=1), second.mean(axis=1), equal_var=False)
    assert compare_runs(first, second).p == pytest.approx(known.pvalue)


@given(st.integers(0, 2**32))
def test_where_seeds_vary_nothing_it_is_the_paired_test_of_the_questions(seed: int) -> None:
    one, other = np.random.default_rng(seed).random((2, 50)) < 0.4
    assume((one != other).sum() > 1)
    found = compare_runs(np.array([one] * 3), np.array([other] * 2))
    known = stats.ttest_rel(one.astype(float), other.astype(float))
    assert found.p == pytest.approx(known.pvalue)
    assert found.interval == pytest.approx(known.confidence_interval())


def test_one_run_a_side_is_mcnemars_test_and_says_nothing_of_seeds() -> None:
    first, second = discordant(19, 4, 41)
    found = compare_runs(first, second)
    assert (found.difference, found.p, found.covers_seeds) == (15 / 64, mcnemar(19, 4), False)
    assert (found.only_first, found.only_second) == (19, 4)
    arm = 1.96 * sqrt((20 / 66 + 5 / 66 - (15 / 66) ** 2) / 66)  # Bonett and Price: two more questions, one for each
    assert found.interval == pytest.approx((15 / 66 - arm, 15 / 66 + arm), abs=1e-5)
    assert compare_runs(first, second[0]).covers_seeds is False
    assert compare_runs(first[0], second[0]).covers_seeds is True  # two untrained rows have none


def test_a_student_that_nobody_trained_has_no_seeds_and_a_single_seed_varies_as_the_others_do() -> None:
    random = np.random.default_rng(1)
    several = random.random((4, 200)) < np.array([[0.2], [0.3], [0.4], [0.3]])
    single = random.random(200) < 0.3
    bare, drawn = compare_runs(several, single), compare_runs(several, single[None])
    assert (bare.difference, bare.covers_seeds) == (drawn.difference, True)
    assert drawn.covers_seeds is False
    assert drawn.interval[1] - drawn.interval[0] > bare.interval[1] - bare.interval[0]
    turned = compare_runs(single, several)
    assert turned.p == pytest.approx(bare.p)
    assert turned.interval == pytest.approx([-end for end in bare.interval[::-1]])


@pytest.mark.parametrize("runs", [1, 3])
def test_students_that_never_differ_are_not_taken_to_be_surely_the_same(runs: int) -> None:
    none = np.zeros((runs, 64), bool)
    found = compare_runs(none, none)
    assert (found.difference, found.p) == (0, 1)
    assert 0.02 < found.interval[1] < 0.06
    assert found.excludes(0.05)
    assert found.detectable > 0.04
    assert compare_runs(none, ~none).p < 1e-15
    few = np.zeros((runs, 10), bool)
    assert not compare_runs(few, few).excludes(0.05)


def test_questions_of_one_only_and_other_numbers_of_them() -> None:
    assert compare_runs(rows("1", "1"), rows("0", "0")).p > 0.1
    with pytest.raises(ValueError, match="3 and 1 questions"):
        compare_runs(rows("101"), rows("0", "0"))


def test_single_runs_show_no_difference_of_fewer_questions_than_would_be_significant() -> None:
    first, second = discordant(1, 0, 63)
    assert mcnemar(5, 0) > 0.05 > mcnemar(6, 0)
    assert compare_runs(first, second).detectable > 6 / 64


def test_a_family_is_corrected_and_what_it_detects_is_larger() -> None:
    random = np.random.default_rng(2)
    right = {name: random.random((3, 300)) < share for name, share in (("a", 0.3), ("b", 0.35), ("c", 0.5))}
    family = compare_family(combinations(right, 2), right)
    assert list(family) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [one.p_holm for one in family.values()] == holm([one.p for one in family.values()])
    alone = compare_runs(right["a"], right["b"])
    assert (alone.p, alone.p_holm) == (family["a", "b"].p, alone.p)
    assert alone.detectable < family["a", "b"].detectable
    document = as_rows(family, margin=0.5)
    assert [(one["first"], one["second"], one["excluded"]) for one in document] == [(*pair, True) for pair in family]
    assert document[0]["p_holm"] == family["a", "b"].p_holm
    assert compare_family([], {}) == {}


def test_intervals_of_an_accuracy() -> None:
    one = rows("1101000000")
    assert accuracy_interval(one) == accuracy_interval(one[0]) == wilson_interval(3, 10)
    assert accuracy_interval(rows("0000000000", "0000000000")) == wilson_interval(0, 10)
    low, high = accuracy_interval(rows("1101000000" * 6, "1101000000" * 6, "0" * 60))
    assert 0 < low < 0.1
    assert high > 0.6  # one of three collapsed: what others would do is open


# Simulated studies. Difficulties vary as in a test set; the two students share them but for `own`, by which each finds
# single questions harder or easier. Every seed has `noise` of its own; one that collapses has hardly a question right.


def simulated(
    seeds: int, questions: int, *, difference: float = 0.0, noise: float = 0.01, collapse: float = 0.0, own: float = 0.5
) -> Iterator[tuple[Right, Right]]:
    """TRIALS studies of two students, the first better by `difference`."""
    random = np.random.default_rng([seeds, questions])

    def student(difficulty: NDArray[np.float64], better: float) -> Right:
        share = 1 / (1 + np.exp(difficulty + own * random.normal(size=questions)))
        level = better + noise * random.normal(size=(seeds, 1))
        shares = np.where(random.random((seeds, 1)) < collapse, 0.005, np.clip(share + level, 0, 1))
        return np.asarray(random.random((seeds, questions)) < shares)

    for _ in range(TRIALS):
        difficulty = 0.8 + 1.5 * random.normal(size=questions)
        yield student(difficulty, difference), student(difficulty, 0.0)


def found(seeds: int, questions: int, **settings: Any) -> float:
    """The share of the studies in which the two are told apart."""
    return fmean(compare_runs(*study).p < 0.05 for study in simulated(seeds, questions, **settings))


@pytest.mark.parametrize(("seeds", "questions"), [(3, 1319), (5, 1319), (5, 64)])
def test_students_that_collapse_one_time_in_three_are_not_told_apart(seeds: int, questions: int) -> None:
    assert found(seeds, questions, collapse=1 / 3) <= 0.07


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_equal_students_are_told_apart_as_often_as_the_level_says(noise: float, own: float) -> None:
    assert 0.03 <= found(5, 1319, noise=noise, own=own) <= 0.07


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_five_points_are_found_with_five_seeds(noise: float) -> None:
    assert found(5, 1319, difference=0.05, noise=noise) >= 0.8


def test_what_is_said_to_be_detectable_is_found_four_times_in_five() -> None:
    said = median(compare_runs(*study).detectable for study in simulated(5, 300))
    assert 0.72 < found(5, 300, difference=said) < 0.88


def test_a_difference_of_the_margin_is_hardly_ever_excluded_and_none_at_all_mostly() -> None:
    excluded = [compare_runs(*study).excludes(MARGIN) for study in simulated(5, 1319, difference=MARGIN)]
    assert fmean(excluded) <= 0.06
    assert fmean(compare_runs(*study).excludes(MARGIN) for study in simulated(5, 1319)) > 0.9


@pytest.mark.parametrize(("seeds", "questions"), [(3, 64), (5, 1319)])
def test_intervals_of_an_accuracy_hold_it(seeds: int, questions: int) -> None:
    normal = np.random.default_rng(0).normal(size=(2, 1_000_000))
    truth = fmean(1 / (1 + np.exp(0.8 + 1.5 * normal[0] + 0.5 * normal[1])))
    held = [low <= truth <= high for low, high in (accuracy_interval(one) for one, _ in simulated(seeds, questions))]
    assert fmean(held) >= 0.93
