"""Intervals and paired tests, against other implementations and plain definitions."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kd.scoring.significance import (
    holm,
    mcnemar,
    rank_sum_test,
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


@given(st.permutations(range(20)), st.integers(1, 19))
def test_the_rank_sum_test_is_the_textbooks(values: list[int], count: int) -> None:
    some, others = values[:count], values[count:]
    known = mannwhitneyu(some, others, alternative="greater", method="asymptotic", use_continuity=False)
    assert rank_sum_test(some, others) == pytest.approx(known.pvalue)


def test_a_tie_of_ranks_counts_for_both() -> None:
    assert rank_sum_test([1, 1, 1], [1, 1]) == 0.5
