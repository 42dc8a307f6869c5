"""The search: one study for many processes, resumed, judged on held-out training rows unless told otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.cli import main

FOLDER = Path("artifacts/mini/search/teacher-kd")


@pytest.fixture
def ready(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """A working folder in which everything up to a search of two trials is done; its params."""
    tiny_params["search"] |= {"trials": 2, "eval_rows": 4}
    write_params(tiny_params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"]):
        assert main(command) == 0
    capsys.readouterr()
    return tiny_params


def test_search_stops_at_its_trials_goes_on_when_more_are_asked_for_and_leaves_plots(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "teacher-kd", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best == json.loads((FOLDER / "result/best.json").read_text())
    assert best["trials"] == 2
    assert 0 <= best["alpha"] <= 1
    assert 1 <= best["temperature"] <= 10
    for name in ("optimization_history", "slice", "contour", "edf"):
        assert (FOLDER / f"result/{name}.png").read_bytes().startswith(b"\x89PNG")
    ready["search"]["trials"] = 3
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["trials"] == 3
    assert more["cross_entropy"] <= best["cross_entropy"]


@pytest.mark.usefixtures("ready")
def test_the_test_split_judges_only_when_asked_and_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "teacher-kd", "--on-test"]) == 0
    captured = capsys.readouterr()
    assert "judging on the test split, as the original did; results on it are then no longer fair" in captured.err
    assert "trials: 2" in captured.out


def test_unusable_searches_exit_2(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["learning_rate"] = 1e30
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 2
    assert "teacher-kd: training diverged in every trial; lower `distill.learning_rate`" in capsys.readouterr().err
    assert main(["search", "fine-tuning"]) == 2
    assert "fine-tuning: it learns from labels alone" in capsys.readouterr().err
    ready["search"]["eval_rows"] = 12
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 2
    assert "search.eval_rows: 12 rows to judge by, but only 12 examples" in capsys.readouterr().err
