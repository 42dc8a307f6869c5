"""Plots by matplotlib, made without a display and the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def accuracy_chart(results: dict[str, Any], path: Path) -> None:
    """Bars of measured accuracy with 95 % intervals, the published figure as a mark on each."""
    from matplotlib.figure import Figure

    experiments = results["experiments"]
    names = list(experiments)
    measured = [100 * experiments[name]["accuracy"] for name in names]
    # A rate of 0 or 1 can lie a rounding error outside its own interval; a bar's arm cannot be negative.
    below = [max(0.0, y - 100 * experiments[name]["interval"][0]) for name, y in zip(names, measured, strict=True)]
    above = [max(0.0, 100 * experiments[name]["interval"][1] - y) for name, y in zip(names, measured, strict=True)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(names, measured, color="#4477aa", yerr=[below, above], capsize=4, label="measured, 95 % interval")
    published = [(i, experiments[name]["published_accuracy"]) for i, name in enumerate(names)]
    marks = [(i, 100 * accuracy) for i, accuracy in published if accuracy is not None]
    axes.plot(*zip(*marks, strict=True), "D", color="#222222", label="published") if marks else None
    axes.set_ylabel("accuracy on the test rows (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"Response-priming distillation, profile {results['profile']}")
    axes.tick_params(axis="x", rotation=20)
    axes.legend()
    figure.savefig(path, dpi=150, metadata={"Software": None})
