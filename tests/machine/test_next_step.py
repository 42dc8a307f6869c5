"""`kd` alone, in every kind of folder that somebody may stand in."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

from kd.cli import main
from kd.config import load_config
from kd.machine import next_step
from kd.machine.stages import Stage, stages_of

MINI = Path("artifacts/mini")
HEAVY = {"torch", "transformers", "peft", "numpy", "scipy", "matplotlib", "dvc", "huggingface_hub"}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What `kd` says here: two to ten lines, and a good end."""

    def say() -> str:
        assert main([]) == 0
        shown = capsys.readouterr().out
        assert 2 <= shown.count("\n") <= 10, shown
        return shown

    return say


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The miniature's params in a checkout of other code's absence: two students and an untrained row."""
    monkeypatch.chdir(tmp_path)
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles/mini.yaml")
    keep(params, "fine-tuning", "base-kd", "no-distillation")
    Path("dvc.yaml").touch()
    YAML().dump(params, Path("params.yaml"))
    return params


def stages() -> list[Stage]:
    return list(stages_of(load_config(Path("params.yaml"))))


def make(*kept: Stage) -> None:
    """Results in the places of some stages', such as they begin with."""
    for stage in kept:
        if stage.target.suffix:
            stage.target.parent.mkdir(parents=True, exist_ok=True)
            stage.target.touch()
        else:
            stage.target.mkdir(parents=True)


def report(**undecided: int) -> None:
    """The report's results, as far as they are looked at."""
    runs = [{"name": name.replace("_", "-"), "undecided": [1] * count} for name, count in undecided.items()]
    (MINI / "report/results.json").write_text(json.dumps({"experiments": {"all": {"runs": runs}}}))


def test_the_stages_are_those_of_dvc(experiment: dict[str, Any]) -> None:
    """Names and targets, by the pipeline's own graph."""
    from dvc.repo import Repo

    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, name)
    (Path("kd")).symlink_to(REPOSITORY / "kd")
    shutil.copytree(REPOSITORY / "reviews", "reviews")
    experiment["seeds"] = [1, 2]
    YAML().dump(experiment, Path("params.yaml"))
    Repo.init(no_scm=True)
    with Repo() as repo:
        known = {stage.addressing: Path(stage.outs[0].fs_path).relative_to(Path.cwd()) for stage in repo.index.stages}
    assert known.pop("attention") == MINI / "attention"
    assert {stage.name: stage.target for stage in stages()} == known


def test_nothing_is_made_yet(experiment: dict[str, Any], said: Callable[[], str]) -> None:
    assert "Here: nothing yet.\nNext: `nox -s mini` makes what" in said()
    experiment["profile"] = "my-own"
    YAML().dump(experiment, Path("params.yaml"))
    assert "Next: `nox -s repro` makes what" in said()
    experiment["needs"]["gpus"] = 4
    YAML().dump(experiment, Path("params.yaml"))
    assert "Before that: `kd doctor`" in said()


@pytest.mark.usefixtures("experiment")
def test_every_stage_comes_next_once_those_before_it_are_there(said: Callable[[], str]) -> None:
    before, *rest = stages()
    make(before)
    for stage in rest:
        assert f"\nNext is {stage.name}: `nox -s mini` makes what is missing and" in said()
        make(stage)
    assert "Next is" not in said()


@pytest.mark.usefixtures("experiment")
def test_what_is_here_is_counted_and_what_is_begun_is_named(said: Callable[[], str]) -> None:
    make(*(stage for stage in stages() if stage.name not in ("train@base-kd-1", "assess@base-kd-1", "report")))
    (MINI / "adapters/.partial/base-kd-1/0123").mkdir(parents=True)
    shown = said()
    assert "Here: inputs, data, the teacher's head, captures, 1 of 2 adapters, 2 of 3 logs, statistics." in shown
    assert "Begun, and at work or stopped: train@base-kd-1;" in shown
    Path("dvc.yaml").unlink()
    assert "Next is train@base-kd-1: `kd train base-kd-1`" in said()
    assert "nox" not in said()


@pytest.mark.usefixtures("experiment")
def test_all_is_made(said: Callable[[], str]) -> None:
    make(*stages())
    report(no_distillation=0, fine_tuning_1=0, base_kd_1=0)
    shown = said()
    assert "the table is artifacts/mini/report/results.md" in shown
    assert "`kd publish crate results.zip`" in shown
    assert "`kd attention`" in shown
    assert "written after" not in shown
    assert "No rule settles" not in shown

    (MINI / "attention").mkdir()
    (MINI / ".partial/report").mkdir(parents=True)
    report(no_distillation=0, fine_tuning_1=2, base_kd_1=1)
    later = (MINI / "report/results.json").stat().st_mtime + 1
    os.utime("params.yaml", (later, later))
    shown = said()
    assert "No rule settles 3 responses; `kd review fine-tuning-1` decides by hand (fine-tuning-1, base-kd-1)." in shown
    assert "params.yaml was written after the report; `dvc status` says what is out of date" in shown
    assert "`kd attention`" not in shown
    assert "Begun, and at work or stopped: report;" in shown


@pytest.mark.usefixtures("experiment")
@pytest.mark.parametrize(
    "content", ["", "{}", '{"experiments": [1]}', '{"experiments": {"a": {"runs": [{"name": 1}]}}}']
)
def test_results_that_are_none_are_made_again(content: str, said: Callable[[], str]) -> None:
    make(*stages())
    assert "`kd report` makes it again" in said()  # there are none
    (MINI / "report/results.json").write_text(content)
    assert "`kd report` makes it again" in said()
    report(no_distillation=0)
    assert "artifacts/mini/report is of other runs; `kd report`" in said()


def test_params_that_are_none_are_named(experiment: dict[str, Any], said: Callable[[], str]) -> None:
    experiment["distill"] = {f"key-{number}": number for number in range(20)}
    YAML().dump(experiment, Path("params.yaml"))
    assert said().startswith("Next, mend this:\nparams.yaml: distill")
    Path("params.yaml").write_text("profile: [\n")
    assert "not readable as YAML" in said()
    Path("params.yaml").unlink()
    Path("params.yaml").mkdir()
    assert "params.yaml: is a folder" in said()


def test_there_are_no_params(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Callable[[], str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"\n  cd {REPOSITORY}\n" in said()
    monkeypatch.setattr(next_step, "CHECKOUT", tmp_path / "site-packages")
    assert "which Git clones" in said()
    checkout = tmp_path / "my checkout"
    (checkout / "docs").mkdir(parents=True)
    (checkout / "dvc.yaml").touch()
    monkeypatch.chdir(checkout / "docs")
    assert f"\n  cd '{checkout}'\n" in said()
    monkeypatch.chdir(checkout)
    Path("params.yaml").symlink_to("artifacts/.state/params.yaml")  # as in the image
    assert said().endswith("\n  nox -s mini\n")
    Path("params.yaml").unlink()
    assert "\n  cp profiles/mini.yaml params.yaml && nox -s mini\n" in said()


def test_another_checkouts_code_says_so(experiment: dict[str, Any], said: Callable[[], str]) -> None:
    del experiment
    Path("kd").mkdir()
    Path("kd/cli.py").touch()
    assert "not the code that runs" in said()


@pytest.mark.usefixtures("experiment")
def test_it_takes_no_time(tmp_path: Path) -> None:
    """A third of a second where nothing else runs; here others may, which makes work longer."""
    make(*stages())
    report(no_distillation=0)
    command = [sys.executable, "-c", "import sys; from kd.cli import main; main([]); print(*sys.modules)"]
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())
    assert min(took) < 1
