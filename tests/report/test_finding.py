"""The sentence that opens page, results.md and the terminal's table: what it says of which results."""

from __future__ import annotations

from typing import Any

import pytest

from kd.report.finding import comparability, finding, listed, p_value

CONTROL = "no-distillation-matched"


def results(
    control: str | None = CONTROL,
    asked_alike: bool = True,
    detectable: float = 0.24,
    excluded: bool = False,
    **trained: tuple[float, float],
) -> dict[str, Any]:
    """Results of students, by name: the difference from the control, and its p-value."""
    experiments: dict[str, dict[str, Any]] = {
        CONTROL: {"trained": False, "collapsed": [], "accuracy": 0.1, "against_control": None}
    }
    for name, (difference, p) in trained.items():
        against = {"difference": difference, "p_holm": p, "asked_alike": asked_alike} if control else None
        against = against and against | {"detectable": detectable + difference / 100, "excluded": excluded}
        accuracy = 0.1 + difference
        experiments[name] = {"trained": True, "collapsed": [], "accuracy": accuracy, "against_control": against}
        experiments[name] |= {"rows": 100, "runs": [{"seed": 1, "correct": round(100 * accuracy)}]}
    return {"control": control, "experiments": experiments}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            results(a=(0.28, 0.0001), b=(0.15, 0.004), c=(0.01, 1.0)),
            "Two of the three trained students answer more test questions right than the untrained one asked the same "
            "way; the largest gain is that of a, 28 points (p < 0.001); for the other no difference is shown (one of "
            "24 points would have been, with 80 % power).",
        ),
        (
            results(a=(0.28, 0.012), b=(0.15, 0.04)),
            "Both trained students answer more test questions right than the untrained one asked the same way; "
            "the largest gain is that of a, 28 points (p 0.012).",
        ),
        (
            results(a=(0.28, 0.012)),
            "The trained student, a, answers more test questions right than the untrained one asked the same way "
            "(28 points, p 0.012).",
        ),
        (
            results(a=(-0.1, 0.012), b=(0.0, 1.0), c=(0.0, 1.0), asked_alike=False),
            "One of the three trained students, a, answers fewer test questions right than the untrained one "
            "(10 points, p 0.012); for the other two no difference is shown (one of 24 points would have been, with 80 "
            "% power).",
        ),
        (
            results(a=(-0.1, 0.012), b=(0.3, 0.001), c=(-0.09, 0.02)),
            "One of the three trained students, b, answers more test questions right than the untrained one asked the "
            "same way (30 points, p 0.001); two answer fewer; the largest drop is that of a, 10 points "
            "(p 0.012).",
        ),
        (
            results(a=(0.016, 1.0), b=(-0.031, 0.5)),
            "None of the two trained students is shown to differ from the untrained one asked the same way; the "
            "largest difference is that of b (-3.1 points, p 0.5); one of 24 points would have been, with 80 % power.",
        ),
        (
            results(a=(0.0, 1.0), excluded=True),
            "The trained student is not shown to differ from the untrained one asked the same way, which has "
            "as many right; a difference of 5 points or more is excluded.",
        ),
        (
            results(a=(0.2, 0.3), detectable=1.2),
            "The trained student is not shown to differ from the untrained one asked the same way (+20.0 points, "
            "p 0.3); with so few runs and questions none could have been.",
        ),
        (
            results(control=None, a=(0.016, 1.0), b=(0.3, 0.5)),
            "Most right of the trained students has b: 40 of 100 test questions; no untrained student asked the same "
            "way stands beside, so the table does not say what training changed.",
        ),
        (results(), "This profile has no trained student, so there is nothing to compare."),
    ],
)  # fmt: skip
def test_what_the_results_show_in_a_sentence(given: dict[str, Any], said: str) -> None:
    assert finding(given) == said


def test_students_that_collapsed_are_named() -> None:
    given = results(a=(-0.1, 1.0), b=(0.0, 1.0))
    given["experiments"]["a"]["collapsed"] = [1]
    assert finding(given).endswith("would have been, with 80 % power; a collapsed.")
    given["experiments"]["b"] |= {"collapsed": [2, 3], "runs": [{"seed": seed} for seed in (1, 2, 3)]}
    assert finding(given).endswith("; a and b (2 of 3 seeds) collapsed.")


@pytest.mark.parametrize(
    ("source", "differs", "said"),
    [
        ("hub", [], "This profile reruns the paper, whose figures stand beside its own."),
        ("hub", ["another teacher"], "Nothing here can be compared with the paper (another teacher)."),
        (
            "miniature",
            ["other data", "another student"],
            "These are the miniature's problems: nothing here can be compared with the paper (other data and another "
            "student).",
        ),
    ],
)
def test_whether_the_paper_may_stand_beside(source: str, differs: list[str], said: str) -> None:
    assert comparability({"dataset": {"source": source}, "differs_from_paper": differs}) == said


def test_lists_and_p_values_as_one_writes_them() -> None:
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]
    assert [p_value(1), p_value(0.0491), p_value(0.00034), p_value(1e-5)] == [
        "p 1",
        "p 0.049",
        "p 0.00034",
        "p < 0.0001",
    ]
