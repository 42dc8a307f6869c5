"""The search: one study for many processes, resumed, judged on held-out training rows unless told otherwise."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from copy import deepcopy
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
import pytest
from commands import unfinished
from conftest import REPOSITORY, make_tiny_params
from forked import begin, status
from ruamel.yaml import YAML

from kd.cli import main
from kd.distill import search
from kd.scoring.collapse import loss_ends

FOLDER = Path("artifacts/mini/search/teacher-kd")
COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


@pytest.fixture(scope="module")
def searchable(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The params of a search of two trials, and the artifacts of everything up to it."""
    params = make_tiny_params(tiny_llama)
    params["search"] |= {"trials": 2, "eval_rows": 4, "seeds": [1, 2]}
    with chdir(tmp_path_factory.mktemp("searchable")):
        YAML().dump(params, Path("params.yaml"))
        for command in (["prepare"], ["head"], ["teacher", "teacher"]):
            assert main(command) == 0
        return params, Path("artifacts").absolute()


@pytest.fixture
def drawn(searchable: tuple[dict[str, Any], Path], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A working folder in which everything up to a search of two trials is done; its params."""
    params, artifacts = searchable
    shutil.copytree(artifacts, "artifacts")
    write_params(params)
    return deepcopy(params)


@pytest.fixture
def ready(drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same for a search whose plots, which take a second, are not drawn."""
    monkeypatch.setattr(search, "_plots", lambda *_: None)
    return drawn


def test_search_stops_at_its_trials_goes_on_when_more_are_asked_for_and_leaves_plots(
    drawn: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["search", "teacher-kd", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best == json.loads((FOLDER / "result/best.json").read_text())
    assert best["trials"] == 2
    assert 0 <= best["alpha"] <= 1
    assert 1 <= best["temperature"] <= 10
    for name in ("optimization_history", "slice", "contour", "edf"):
        assert (FOLDER / f"result/{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(search, "_plots", lambda *_: None)
    drawn["search"]["trials"] = 3
    write_params(drawn)
    assert main(["search", "teacher-kd", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["trials"] == 3
    assert more["cross_entropy"] <= best["cross_entropy"]
    drawn["search"] |= {"trials": 1, "seeds": [1]}  # trials of two seeds are others
    write_params(drawn)
    assert main(["search", "teacher-kd", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["trials"], list(one["seeds"])) == (1, ["1"])
    assert one["spread"]["standard_deviation"] == 0


@pytest.mark.usefixtures("ready")
def test_the_test_split_judges_only_when_asked_and_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "teacher-kd", "--on-test"]) == 0
    captured = capsys.readouterr()
    assert "judging on the test split, as the original did; results on it are then no longer fair" in captured.err
    assert "trials: 2" in captured.out


def trials(*states: optuna.trial.TrialState) -> list[optuna.trial.FrozenTrial]:
    """The trials of the one study in the default file that are in one of `states`, complete ones if none is named."""
    storage = f"sqlite:///{FOLDER / 'study.db'}"
    return optuna.load_study(study_name=None, storage=storage).get_trials(states=states or (COMPLETE,))


def test_a_range_of_learning_rates_is_searched_by_its_logarithm(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["search"] |= {"alpha": [0.5, 0.5], "temperature": [2.0, 2.0], "learning_rate": [1e-3, 0.05]}
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert list(best)[:4] == ["alpha", "temperature", "learning_rate", "cross_entropy"]
    assert (best["alpha"], best["temperature"]) == (0.5, 2)
    # They differ in nothing but the rate, which therefore is what they were trained at.
    one, other = trials()
    assert one.value != other.value
    for trial in (one, other):
        assert 1e-3 <= trial.params["learning_rate"] <= 0.05
        assert trial.distributions["learning_rate"].log
    # The better one's, or the lower one's where the better one's seeds do not tell them apart.
    better, worse = sorted((one, other), key=lambda trial: trial.value)
    near = worse.value <= better.value + stdev(better.user_attrs["seeds"].values())
    rates = [trial.params["learning_rate"] for trial in (better, worse)]
    assert best["learning_rate"] == (min(rates) if near else rates[0])


def in_company() -> None:
    """Let neither of two processes end its first trial before the other has begun one; plots are not drawn."""
    descend = search.descend

    def descend_in_company(*arguments: Any) -> Any:
        Path(f"began-{os.getpid()}").touch()
        while len(list(Path().glob("began-*"))) < 2:
            time.sleep(0.01)
        return descend(*arguments)

    search.descend = descend_in_company  # type: ignore[assignment]
    search._plots = lambda *_: None


@pytest.mark.usefixtures("on_cpu")
def test_two_processes_at_once_share_a_study_and_leave_one_whole_result(
    drawn: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    drawn["search"] |= {"trials": 4, "seeds": [1]}
    write_params(drawn)
    said = [Path(name) for name in ("one", "other")]
    processes = [begin("search", "teacher-kd", said=path, first=in_company) for path in said]
    assert [status(process) for process in processes] == [0, 0], [path.read_text() for path in said]
    assert all("trial " in path.read_text() for path in said)  # both took part
    ended = trials(COMPLETE, PRUNED)
    assert 4 <= len(ended) <= 5
    assert len({trial.number for trial in ended}) == len(ended)
    best = json.loads((FOLDER / "result/best.json").read_text())
    assert best["trials"] == len(ended)
    assert best["cross_entropy"] == min(trial.value for trial in trials())
    assert [path.name for path in (FOLDER / "result").iterdir()] == ["best.json"]
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
    ready["search"] |= {"learning_rate": None, "seeds": [1, 2, 1]}
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 2
    assert "search.seeds: a seed stands twice; name each once" in capsys.readouterr().err


def test_values_that_teach_nothing_are_said_to_teach_nothing(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["learning_rate"] = 1e-3
    ready["search"] |= {"trials": 1, "seeds": [1], "alpha": [1.0, 1.0]}
    write_params(ready)
    assert main(["search", "teacher-kd", "--json"]) == 0
    captured = capsys.readouterr()
    best = json.loads(captured.out)
    assert best["cross_entropy"] == pytest.approx(best["untrained"], abs=0.01)
    worse = "teacher-kd: even these values leave the worst seed no better than the untrained student"
    assert (worse in captured.err) == (best["cross_entropy"] >= best["untrained"])


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
    ready["search"] |= {"trials": 1, "seeds": [seed]}
    ready["distill"]["epochs"] = 1
    write_params(ready)
    assert main(["search", "teacher-kd"]) == 0
    assert len(trials()) == 1


# Far beyond what a student bears, as a range that nobody has tried may reach.
TOO_HIGH = {"alpha": [0.5, 1.0], "learning_rate": [1e-2, 1e3]}


def test_a_range_that_reaches_far_too_high_is_survived_and_what_is_printed_can_be_pasted(
    ready: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ready["distill"]["protocol"] = "aligned"
    ready["search"] |= TOO_HIGH | {"trials": 10, "seeds": [1, 2, 3]}
    write_params(ready)
    assert main(["teacher", "teacher"]) == 0
    capsys.readouterr()
    assert main(["search", "teacher-kd"]) == 0
    ended, reasons = trials(COMPLETE, PRUNED), re.findall(r"Trial (\d+) pruned\. (Seed \d: .+)", caplog.text)
    assert [int(number) for number, _ in reasons] == [trial.number for trial in trials(PRUNED)]
    assert any("its training diverged, its loss was" in why for _, why in reasons)
    assert all(trial.number in {int(number) for number, _ in reasons} for trial in ended if rate(trial) > 10)

    printed = capsys.readouterr().out
    best = json.loads((FOLDER / "result/best.json").read_text())
    assert f"# trials: 10, {len(reasons)} of them pruned" in printed
    assert f"standard deviation {best['spread']['standard_deviation']:.4f}" in printed
    assert [f"seed {seed} {loss:.4f}" in printed for seed, loss in best["seeds"].items()] == [True] * 3
    assert max(best["seeds"].values()) == best["cross_entropy"] < best["untrained"]
    found = YAML(typ="safe").load(printed)
    searched = {name: best[name] for name in ("alpha", "temperature", "learning_rate")}
    assert found["distill"] == found["distill"] | ready["distill"] | searched
    for losses in trained(ready | found, write_params, capsys):
        assert not loss_ends(losses)["rose"]
        assert fmean(losses[12:]) < fmean(losses[:12])  # the second epoch, the first


def rate(trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.params["learning_rate"])


def trained(
    params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> Iterator[list[float]]:
    """The training losses of three seeds."""
    write_params(params | {"seeds": [1, 2, 3]})
    assert main(["train", "teacher-kd"]) == 0
    capsys.readouterr()
    for seed in (1, 2, 3):
        lines = Path(f"artifacts/mini/adapters/teacher-kd-{seed}/loss/plots/metrics/loss.tsv").read_text().splitlines()
        yield [float(line.split("\t")[1]) for line in lines[1:]]


def test_a_trial_in_a_cohort_that_loses_a_student_leaves_the_others_alone(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ready["distill"]["dropout"] = 0.0
    ready["search"] |= TOO_HIGH | {"trials": 4}
    found = []
    for together in (4, 1):
        ready["search"]["together"] = together
        write_params(ready)
        assert main(["search", "teacher-kd", "--json"]) == 0
        best = json.loads(capsys.readouterr().out)
        lost = {trial.number: trial.user_attrs["collapsed"] for trial in trials(PRUNED)}
        found.append((best["learning_rate"], best["pruned"], lost.keys()))
        assert best["cross_entropy"] == max(best["seeds"].values())
        shutil.rmtree(FOLDER)
    assert found[0] == found[1]
    assert 0 < found[0][1] < 4


@pytest.mark.often
def test_values_searched_on_the_miniature_train_three_seeds_without_a_collapse(
    write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2, six trials of three seeds, eight minutes on two cores; `pytest -m often -s` prints what it found."""
    params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["search"] |= {"trials": 6, "learning_rate": [5e-3, 5e-1]}
    write_params(params)
    for command in (["prepare"], ["head"], ["teacher", "teacher"], ["search", "teacher-kd"]):
        assert main(command) == 0
    printed = capsys.readouterr()
    with capsys.disabled():
        print(printed.out, *re.findall("Trial .+", printed.err), sep="\n")
    for losses in trained(params | YAML(typ="safe").load(printed.out), write_params, capsys):
        with capsys.disabled():
            print(f"training loss {fmean(losses[:8]):.3f}, {fmean(losses[-8:]):.3f}")
        assert not loss_ends(losses)["rose"]
