"""Intervals and paired tests, against other implementations and plain definitions."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kd.scoring.significance import (
    bootstrap_interval,
    holm,
    mcnemar,
    paired_differences,
    rank_sum_test,
    sign_flip_test,
    wilson_interval,
)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """What is imported already is no garbage: statsmodels' `multipletests` collects anew in every call."""
    gc.freeze()
    yield
    gc.unfreeze()


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_that_of_statsmodels(counts: tuple[int, int]) -> None:
    assert wilson_interval(*counts) == pytest.approx(proportion_confint(*counts, method="wilson"), abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_that_of_statsmodels(only_first: int, only_second: int) -> None:
    expected = statsmodels_mcnemar([[5, only_first], [only_second, 7]], exact=True).pvalue
    assert mcnemar(only_first, only_second) == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.usefixtures("little_garbage")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-12)


def test_bootstrap_interval_is_that_of_drawing_rows() -> None:
    rows = np.array([1] * 30 + [-1] * 12 + [0] * 158)
    random = np.random.default_rng(3)
    means = rows[random.integers(0, len(rows), size=(10_000, len(rows)))].mean(axis=1)
    expected = np.percentile(means, [2.5, 97.5])
    found = bootstrap_interval([1, -1, 0], [30, 12, 158], np.random.default_rng(4))
    assert found == pytest.approx(tuple(expected), abs=0.006)


def test_differences_count_every_seed_and_one_run_as_often_as_the_other_side_has_seeds() -> None:
    three = np.array([[True, True, False], [True, False, False], [True, False, False]])
    one = np.array([[False, True, True]])
    differences, runs = paired_differences(three, one)
    assert (differences.tolist(), runs) == ([3, -2, -3], 3)
    differences, runs = paired_differences(three[:2], three)
    assert (differences.tolist(), runs) == ([0, 1, 0], 6)  # (2, 1, 0) thrice against (3, 1, 0) twice


@given(st.integers(0, 700), st.integers(0, 700), st.integers(0, 20))
def test_with_one_run_a_side_the_sign_flip_test_is_mcnemars(only_first: int, only_second: int, tied: int) -> None:
    differences = np.repeat([1, -1, 0], [only_first, only_second, tied])
    assert sign_flip_test(differences) == pytest.approx(mcnemar(only_first, only_second), rel=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=10))
def test_the_sign_flip_test_is_that_of_trying_all_signs(differences: list[int]) -> None:
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(abs(one) >= abs(sum(differences)) for one in sums) / len(sums)
    assert sign_flip_test(np.array(differences)) == pytest.approx(expected, rel=1e-9)


def test_small_p_values_keep_their_digits() -> None:
    assert sign_flip_test(np.repeat([3], 200)) == pytest.approx(2 / 2**200, rel=1e-9)
    assert sign_flip_test(np.repeat([1, -1], [900, 100])) == pytest.approx(
        2 * sum(comb(1000, k) for k in range(101)) / 2**1000, rel=1e-9
    )


@given(st.permutations(range(20)), st.integers(1, 19))
def test_the_rank_sum_test_is_the_textbooks(values: list[int], count: int) -> None:
    some, others = values[:count], values[count:]
    known = mannwhitneyu(some, others, alternative="greater", method="asymptotic", use_continuity=False)
    assert rank_sum_test(some, others) == pytest.approx(known.pvalue)


def test_a_tie_of_ranks_counts_for_both() -> None:
    assert rank_sum_test([1, 1, 1], [1, 1]) == 0.5
