"""Intervals and paired tests, against other implementations and plain definitions."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kd.report.statistics import bootstrap_interval, compare_pairs, holm, mcnemar, wilson_interval


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
    assert bootstrap_interval(30, 12, 200, np.random.default_rng(4)) == pytest.approx(tuple(expected), abs=0.006)


def test_every_pair_is_compared_on_the_same_rows_and_the_same_way_each_time() -> None:
    right = {
        "a": [True, True, True, True, True, True, False, False],
        "b": [False, False, False, False, False, False, True, False],
        "c": [True, True, True, True, True, True, False, False],
    }
    pairs = compare_pairs(right, seed=7)
    assert [(p.first, p.second) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = pairs[0]
    assert (first.only_first, first.only_second, first.difference) == (6, 1, 5 / 8)
    assert first.interval[0] < first.difference < first.interval[1]
    assert pairs[1].p == pairs[1].p_holm == 1.0
    assert pairs[1].interval == (0.0, 0.0)
    assert first.p_holm == pytest.approx(3 * first.p)
    assert compare_pairs(right, seed=7) == pairs


def test_one_experiment_has_no_pairs() -> None:
    assert compare_pairs({"a": [True]}, seed=1) == []
