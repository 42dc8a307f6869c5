"""The study engine over Dask: stopped and gone on with, other clusters, tasks that fail and workers that are lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import LocalCluster
from forked import SAID, status
from small_study import RATE, kd_study, run_to_end, small_study, write_study

from kd.cli import STUDY_ENVIRONMENT, main
from kd.study.plan import Plan
from kd.study.results import read_study

# Put before a task's process: it does no work, and says in began/ and ended/ that it was there.
STAND_IN = """
import os, sys, time
from pathlib import Path
import kd.study.work

def do(plan, name, kd):
    for told in ("began", "ended"):
        file = Path(told, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            print(os.getpid(), file=lines)
        if told == "began":
            time.sleep(float(os.environ.get("SECONDS", "0")))
            if name == os.environ.get("FAILS"):
                print("no luck today", file=sys.stderr)
                return 1
    return 0

kd.study.work.do = do
kd.study.work.Plan.diverged = lambda plan, run: False
"""


@pytest.fixture
def small(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    """A study's YAML; its folder is `tmp_path`."""
    study = small_study(tiny_llama)
    write_study(tmp_path, study)
    return study


@pytest.fixture
def stand_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tasks be processes that do nothing, quickly."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tasks in this process: what they set in the environment is set back."""
    for name, value in STUDY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KD_STUDY_WORKER", raising=False)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(folder: Path, what: str) -> dict[str, list[str]]:
    """The process ids that each task's stand-in has left."""
    base = folder / "work" / what
    return {path.relative_to(base).as_posix(): path.read_text().split() for path in base.rglob("*") if path.is_file()}


def alive(pids: list[str]) -> list[str]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += [pid] if psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE else []
    return found


def worker_at(task: str) -> list[psutil.Process]:
    """The worker, a process below this one, that runs a task."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[3:5] == ["study", "task"] and task in process.cmdline():
                found.append(process.parent())
    return found


def what_came(path: Path) -> list[dict[str, Any]]:
    """A study's runs but for when and by what they were made."""
    return [{key: value for key, value in run.items() if key != "made"} for run in read_study(path)["runs"]]


@pytest.fixture
def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[], LocalCluster]:
    """Start two workers on a CPU, as somebody else would."""
    for name in dask.config.get("distributed.nanny.pre-spawn-environ"):  # which a cluster sets in this process
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda: LocalCluster(n_workers=2, threads_per_worker=1, resources={"heavy": 1}, dashboard_address=None)


@pytest.mark.usefixtures("in_process")
def test_a_study_that_is_stopped_and_loses_a_worker_goes_on_and_ends_in_the_same_results(
    small: dict[str, Any],
    tmp_path: Path,
    start_cluster: Callable[[], LocalCluster],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, one_by_one = str(tmp_path), tmp_path / "one by one"
    small["seeds"] = [1]
    small["conditions"]["rate"]["students"] = ["base-kd"]
    small["questions"]["training"]["pairs"].pop()
    write_study(tmp_path, small)
    first = kd_study("run", tmp_path)
    data = tmp_path / "work/tasks/data.json"
    wait_for(lambda: data.exists() and "made" in json.loads(data.read_text()))
    first.terminate()
    assert status(first, 60) == 143
    assert "terminated; what is done is kept, and the same command goes on" in (tmp_path / SAID).read_text()
    before = data.stat().st_mtime_ns

    with start_cluster() as cluster:
        second = kd_study("run", tmp_path, "--scheduler", cluster.scheduler_address)
        wait_for(lambda: worker_at("cohort-rate"))
        worker_at("cohort-rate")[0].kill()
        assert status(second, 300) == 0, (tmp_path / SAID).read_text()
    assert data.stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "work/artifacts/capture-self-aligned")  # what only runs that are over needed may go
    assert main(["study", "run", folder]) == 0
    (tmp_path / "README.md").write_text("<!-- table: training --><!-- end of table -->\n?<!-- rows.train:d --> rows\n")
    assert main(["study", "results", folder]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert "| rate/base-kd - untrained/matched |" in readme
    assert "6<!-- rows.train:d --> rows" in readme

    write_study(one_by_one, small)
    for task in Plan(one_by_one / "study.yaml").tasks:
        assert main(["study", "task", str(one_by_one), task]) == 0
    assert main(["study", "results", str(one_by_one)]) == 0
    study = read_study(tmp_path / "results.json")
    for run in (runs := what_came(tmp_path / "results.json")):
        run["command"] = run["command"].replace(tmp_path.name, one_by_one.name)
    assert runs == what_came(one_by_one / "results.json")
    assert study["settings"]["rate"]["distill"]["learning_rate"] == RATE["distill.learning_rate"]
    made = study["runs"][-1]["made"]
    assert list(made) == ["cohort-rate", "stopped/base-kd-1"]
    assert made["cohort-rate"]["began"] <= made["stopped/base-kd-1"]["ended"]
    assert made["cohort-rate"]["versions"]["torch"]
    assert len(list((tmp_path / "logs").glob("*.csv.xz"))) == len(study["runs"]) == study["planned"] == 3

    _changed_settings_are_refused(small, tmp_path, capsys)


def _changed_settings_are_refused(small: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of runs that are over; what no run has had is no change."""
    small["params"]["assess"]["max_new_tokens"] = 5
    small["question"] = "Another?"
    write_study(folder, small)
    capsys.readouterr()
    for command in ("run", "results"):
        assert main(["study", command, str(folder)]) == 2
        words = capsys.readouterr().err
        assert "ran with stopped.assess.max_new_tokens 4, and " in words or "ran with untrained.assess" in words
        assert "study.yaml has 5 now; change it back, or take another --work" in words
    small["params"]["assess"]["max_new_tokens"] = 4
    small["conditions"]["rate"]["params"] = {"distill.learning_rate": 0.03}
    write_study(folder, small)
    assert main(["study", "run", str(folder)]) == 2
    assert "rate.distill.learning_rate 0.02, and" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_what_was_made_of_other_inputs_is_made_again(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small["searches"] = {"search": {"student": "base-kd"}}
    write_study(tmp_path, small)
    for task in ("data", "untrained/matched"):
        assert main(["study", "task", str(tmp_path), task]) == 0
    log = tmp_path / "work/artifacts/untrained/logs/matched.csv"
    before = log.stat().st_mtime_ns
    assert main(["study", "task", str(tmp_path), "untrained/matched"]) == 0
    assert log.stat().st_mtime_ns == before
    record = tmp_path / "work/tasks/data.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"made": "0" * 64}))
    assert main(["study", "task", str(tmp_path), "untrained/matched"]) == 0
    assert log.stat().st_mtime_ns != before
    capsys.readouterr()
    assert main(["study", "results", str(tmp_path)]) == 0  # of the runs there are
    assert "6 of 7 runs are missing, among them rate/fine-tuning-1" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_a_student_that_diverges_is_kept_in_with_nothing_right(small: dict[str, Any], tmp_path: Path) -> None:
    del small["conditions"]["stopped"], small["conditions"]["untrained"]["students"][1:]
    small["conditions"]["rate"] = {"students": ["base-kd"], "params": {"distill.learning_rate": 1e30}}
    small["questions"]["training"]["pairs"].pop()
    write_study(tmp_path, small)
    for task in Plan(tmp_path / "study.yaml").tasks:
        assert main(["study", "task", str(tmp_path), task]) == 0
    assert main(["study", "results", str(tmp_path)]) == 0
    study = read_study(tmp_path / "results.json")
    student = study["summary"]["students"]["rate/base-kd"]
    assert (student["collapsed"], student["documented"]["accuracy"], student["answer_loss"]) == ([1, 2], 0, None)
    assert [run["diverged"] for run in study["runs"]] == [False, True, True]
    assert main(["study", "run", str(tmp_path)]) == 0


@pytest.mark.usefixtures("in_process")
def test_an_adapter_that_is_gone_is_trained_again(small: dict[str, Any], tmp_path: Path) -> None:
    small["seeds"] = [1]
    small["conditions"] = {"untrained": {"students": ["matched"]}, "rate": {"students": ["base-kd"]}}
    small["questions"]["training"]["pairs"] = [["rate/base-kd", "untrained/matched"]]
    write_study(tmp_path, small)
    tasks = list(Plan(tmp_path / "study.yaml").tasks)
    for task in tasks:
        assert main(["study", "task", str(tmp_path), task]) == 0
    made = tmp_path / "work/artifacts/rate"
    files = [made / "adapters/base-kd-1/adapter_model.safetensors", made / "logs/base-kd-1.csv"]
    before = [file.read_bytes() for file in files]
    shutil.rmtree(files[0].parent)
    files[1].unlink()
    for task in tasks:
        assert main(["study", "task", str(tmp_path), task]) == 0
    assert [file.read_bytes() for file in files] == before


@pytest.mark.usefixtures("small", "stand_in")
def test_a_task_that_fails_is_named_what_needs_it_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "cohort-rate")
    ended, said = run_to_end("run", tmp_path, "--jobs", "2")
    assert ended == 1
    assert "cohort-rate failed: no luck today" in said
    assert "stopped/base-kd-2 is left out, since cohort-rate failed" in said
    assert set(told(tmp_path, "ended")) == {"data", "capture-self-aligned", "untrained/matched"}
    assert "3 of 10 tasks are done; the same command goes on" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("small", "stand_in")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    monkeypatch.setenv("SECONDS", "60")
    process = kd_study("run", tmp_path)
    wait_for(lambda: told(tmp_path, "began").get("data"))
    assert process.pid
    children = [str(child.pid) for child in psutil.Process(process.pid).children(recursive=True)]
    assert told(tmp_path, "began")["data"][0] in children
    os.kill(process.pid, how)
    assert status(process, 60) == (-9 if how == signal.SIGKILL else 128 + how)
    wait_for(lambda: not alive(children), 5)


@pytest.mark.usefixtures("small", "stand_in")
def test_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDS", "60")
    ended, said = run_to_end("run", tmp_path, "--minutes", "0.02")
    assert (ended, "0 of 10 tasks are done; the same command goes on" in said) == (1, True)


@pytest.mark.usefixtures("small", "stand_in")
def test_a_stop_ends_what_runs_on_a_cluster_and_leaves_the_cluster(
    tmp_path: Path, start_cluster: Callable[[], LocalCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS", "60")
    with start_cluster() as cluster:
        process = kd_study("run", tmp_path, "--scheduler", cluster.scheduler_address)
        wait_for(lambda: told(tmp_path, "began").get("data"))
        running = told(tmp_path, "began")["data"]
        process.terminate()
        status(process, 60)
        wait_for(lambda: not alive(running), 5)
        assert len(cluster.scheduler_info["workers"]) == 2
    assert told(tmp_path, "ended") == {}


@pytest.mark.usefixtures("small")
def test_a_cluster_that_does_not_answer_or_takes_nothing_heavy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd.study.engine.CONNECT_S", 1)
    assert main(["study", "run", str(tmp_path), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert "no Dask scheduler answers there" in capsys.readouterr().err
    with LocalCluster(n_workers=1, processes=False, dashboard_address=None, protocol="tcp") as cluster:
        assert main(["study", "run", str(tmp_path), "--scheduler", cluster.scheduler_address]) == 2
    assert "--nthreads 1 --resources heavy=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seeds", [], "seeds: "),
        ("seeds", [1, 1], "seeds: a seed stands twice"),
        ("control", "untrained/none", "control: untrained/none: not there; one of untrained/matched, rate/fine-tuning"),
        ("conditions.rate.students", ["base"], "rate: students: base: not there; one of fine-tuning, base-kd"),
        ("conditions.rate.teacher", "tuned", "rate: teacher: tuned: not there; one of self"),
        ("conditions.rate.values", "search", "rate: values: search: not there; one of "),
        ("conditions.stopped.trained_in", "rates", "stopped: trained_in: rates: not there; one of untrained, rate"),
        (
            "conditions.rate.params",
            {"dataset.seed": 3},
            "rate: params: dataset.seed: conditions have data, prompts and",
        ),
        (
            "conditions.rate.params",
            {"distill.alpha.x": 3},
            "rate: params: distill.alpha.x: the study's params have no mapping 'alpha'",
        ),
        ("questions.training.pairs", [["rate/base-kd", "rate/base"]], "pairs: rate/base: not there; one of untrained/"),
        ("params.distill.alpha", 2, "params: distill.alpha: "),
        ("conditions.rate.params", {"distill.alpha": 2}, "rate: distill.alpha: expected less than or equal to 1"),
    ],
)
def test_what_the_yaml_names_has_to_be_there(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    *outer, last = key.split(".")
    inner = small
    for name in outer:
        inner = inner[name]
    inner[last] = value
    write_study(tmp_path, small)
    assert main(["study", "run", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("small", "in_process")
def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    assert main(["study", "task", folder, "nothing"]) == 2
    assert "nothing: no such task; one of data, capture-self-aligned, " in capsys.readouterr().err
    assert main(["study", "results", folder]) == 2
    assert "no run is done; `kd study run studies/" in capsys.readouterr().err
    assert main(["study", "tables", folder]) == 2
    assert "results.json: no such file" in capsys.readouterr().err
    assert main(["study", "run", folder, "--work", str(tmp_path / "study.yaml")]) == 2
    assert "study.yaml: is a file; name a folder" in capsys.readouterr().err
    (tmp_path / "study.yaml").unlink()
    assert main(["study", "run", folder]) == 2
    assert "study.yaml: no such file" in capsys.readouterr().err


@pytest.mark.usefixtures("small", "in_process")
def test_a_disk_without_links_is_refused_and_another_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as without:
        without.setattr(os, "symlink", refused)
        assert main(["study", "task", str(tmp_path), "untrained/matched"]) == 2
    said = capsys.readouterr().err
    assert "share data and teachers by links, which this disk does not take (Operation not permitted); name a" in said
    assert main(["study", "task", str(tmp_path), "data", "--work", str(tmp_path / "another disk")]) == 0


@pytest.mark.parametrize("module", ["kd.cli", "kd.study.publish"])
def test_dask_is_loaded_by_a_run_alone(module: str) -> None:
    code = f"import {module}, sys; sys.exit('distributed' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
