"""The search: one study for many processes, resumed, judged on held-out training rows unless told otherwise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import unfinished

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


def trials() -> list[optuna.trial.FrozenTrial]:
    """The finished trials of the one study in the default file."""
    storage = f"sqlite:///{FOLDER / 'study.db'}"
    return optuna.load_study(study_name=None, storage=storage).get_trials(states=(optuna.trial.TrialState.COMPLETE,))


def test_a_range_of_learning_rates_is_searched_by_its_logarithm(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["search"] |= {"alpha": [0.5, 0.5], "temperature": [2.0, 2.0], "learning_rate": [1e-3, 0.05]}
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert list(best) == ["alpha", "temperature", "learning_rate", "cross_entropy", "trials"]
    assert (best["alpha"], best["temperature"]) == (0.5, 2)
    # They differ in nothing but the rate, which therefore is what they were trained at.
    one, other = trials()
    assert one.value != other.value
    for trial in (one, other):
        assert 1e-3 <= trial.params["learning_rate"] <= 0.05
        assert trial.distributions["learning_rate"].log
    assert best["learning_rate"] == min((one, other), key=lambda trial: trial.value).params["learning_rate"]


# Two processes that are at `kd search` together: neither ends its first trial before the other has begun one. Forked,
# so that the libraries are imported once. What each says is in a file of its own.
TOGETHER = """if True:
    import os, time
    import peft, optuna.visualization.matplotlib
    from kd.cli import main
    from kd.distill import search

    evaluate = search.evaluate

    def evaluate_in_company(*arguments):
        os.close(os.open(f"began-{os.getpid()}", os.O_CREAT))
        while sum(name.startswith("began-") for name in os.listdir()) < 2:
            time.sleep(0.01)
        return evaluate(*arguments)

    search.evaluate = evaluate_in_company
    children = []
    for name in ("one", "other"):
        child = os.fork()
        if child == 0:
            said = os.open(name, os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os._exit(main(["search", "teacher-kd"]))
        children.append(child)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_two_processes_at_once_share_a_study_and_leave_one_whole_result(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    ready["search"]["trials"] = 8
    write_params(ready)
    done = subprocess.run([sys.executable, "-c", TOGETHER], capture_output=True, text=True, timeout=300)
    said = [Path(name).read_text() for name in ("one", "other")]
    assert done.stdout == "[0, 0]\n", (done.stderr, said)
    assert all("trial " in text for text in said)  # both took part
    assert 8 <= len(trials()) <= 10
    assert len({trial.number for trial in trials()}) == len(trials())
    best = json.loads((FOLDER / "result/best.json").read_text())
    assert best["trials"] == len(trials())
    assert best["cross_entropy"] == min(trial.value for trial in trials())
    assert sorted(path.name for path in (FOLDER / "result").iterdir()) == [
        "best.json",
        *(f"{name}.png" for name in ("contour", "edf", "optimization_history", "slice")),
    ]
    assert not unfinished()


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
    ready["search"] |= {"eval_rows": 4, "learning_rate": [0.05, 1e-3]}
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 2
    assert "search: learning_rate: expected [low, high], found [0.05, 0.001]" in capsys.readouterr().err


@pytest.mark.usefixtures("ready")
def test_trials_trained_together_are_trials(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["dropout"] = 0.0  # a cohort draws it for all together
    ready["search"] |= {"trials": 3, "together": 2}
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert together["trials"] == 3
    shutil.rmtree(FOLDER)
    ready["search"]["together"] = 1
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert together["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-3)
    assert (together["alpha"], together["temperature"]) == (alone["alpha"], alone["temperature"])


@pytest.mark.parametrize("seed", [20241221, 2**64 - 1])
def test_any_seed_that_params_take_is_taken_by_the_samplers(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], seed: int
) -> None:
    ready["seed"] = seed
    ready["search"] |= {"trials": 1}
    ready["distill"]["epochs"] = 1
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 0
    assert len(trials()) == 1
