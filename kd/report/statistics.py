"""Statistics of the results table."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, both ends between 0 and 1."""
    interval = binomtest(correct, rows).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
