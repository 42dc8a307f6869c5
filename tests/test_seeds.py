"""One experiment with several seeds: each student's runs by the command line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import contents, unfinished
from conftest import make_tiny_params
from forked import SAID, begin, status
from params import keep
from ruamel.yaml import YAML

from kd.cli import main

MINI = Path("artifacts/mini")
ADAPTERS, LOGS = MINI / "adapters", MINI / "logs"


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two seeds, one student with a teacher, which is trained, and one without, which is not."""
    folder = tmp_path_factory.mktemp("trained")
    params = make_tiny_params(tiny_llama)
    keep(params, "base-kd", "fine-tuning", "no-distillation-matched")
    params["seeds"] = [3, 20]
    params["distill"]["learning_rate"] = 0.01
    YAML().dump(params, folder / "params.yaml")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for command in ("prepare", "head", "teacher base", "train base-kd"):
            assert main(command.split()) == 0
    return folder


@pytest.fixture
def ready(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The params of that folder; the working folder is a copy of it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    params: dict[str, Any] = YAML(typ="safe").load(Path("params.yaml"))
    return params


def weights(run: str) -> bytes:
    return (ADAPTERS / run / "adapter_model.safetensors").read_bytes()


def test_a_students_name_stands_for_its_runs_and_a_runs_for_itself(
    ready: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train fine-tuning", "assess base-kd", "assess fine-tuning"):
        assert main(command.split()) == 0
    runs = {"base-kd-3", "base-kd-20", "fine-tuning-3", "fine-tuning-20"}
    assert {path.name for path in ADAPTERS.iterdir()} == runs == {path.stem for path in LOGS.iterdir()}
    for stage in ("train", "assess"):
        assert {path.stem for path in (MINI / "runs" / stage).iterdir()} == runs
    assert len({weights(run) for run in runs}) == 4
    assert "- seed: 20\n" in (ADAPTERS / "base-kd-20/README.md").read_text()

    before = contents(ADAPTERS / "base-kd-20"), (LOGS / "base-kd-20.csv").read_bytes()
    write_params(ready | {"seeds": [20]})  # alone, and whatever other seeds there are
    for command in ("train base-kd", "assess base-kd-20"):
        assert main(command.split()) == 0
    assert (contents(ADAPTERS / "base-kd-20"), (LOGS / "base-kd-20.csv").read_bytes()) == before
    write_params(ready)

    for command in ("assess no-distillation-matched", "statistics", "report", "attention"):
        assert main(command.split()) == 0
    results = json.loads((MINI / "report/results.json").read_text())
    assert {name: [run["name"] for run in one["runs"]] for name, one in results["experiments"].items()} == {
        "no-distillation-matched": ["no-distillation-matched"],
        "fine-tuning": ["fine-tuning-3", "fine-tuning-20"],
        "base-kd": ["base-kd-3", "base-kd-20"],
    }
    attention = (MINI / "attention/confidence.csv").read_text()
    assert {line.split(",")[0] for line in attention.splitlines()[1:]} == {"no-distillation-matched", *runs}
    capsys.readouterr()
    assert main(["measure", "base-kd"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["base-kd-3"] * 3 + ["base-kd-20"] * 3
    assert not unfinished()


@pytest.mark.usefixtures("ready")
def test_two_processes_assess_a_students_runs_as_one_does() -> None:
    assert main(["assess", "base-kd"]) == 0
    alone = contents(LOGS)
    shutil.rmtree(LOGS)
    processes = [begin("assess", "base-kd", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [status(process) for process in processes] == [0, 0], SAID.read_text()
    assert contents(LOGS) == alone


@pytest.mark.parametrize("command", ["review base-kd", "assess base-kd --compare 1", "measure base-kd --json"])
@pytest.mark.usefixtures("ready")
def test_where_one_run_is_needed_a_student_with_several_is_told_them(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(command.split()) == 2
    assert capsys.readouterr().err == "kd: base-kd: has several runs here, base-kd-3, base-kd-20; name one of them\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train base-kd-4", "expected one of fine-tuning, base-kd, or a run, such as fine-tuning-3; did you mean"),
        ("assess bse-kd", "no-distillation-matched, fine-tuning, base-kd, or a run, such as fine-tuning-3; did you"),
        ("train no-distillation-matched", "no-distillation-matched: unknown student, expected one of fine-tuning, "),
        ("search base-kd-3", "base-kd-3: unknown student, expected one of fine-tuning, base-kd; did you mean"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(
    ready: dict[str, Any], command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del ready
    capsys.readouterr()
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("ready")
def test_killed_between_two_seeds_the_same_command_goes_on_with_the_second() -> None:
    whole = contents(ADAPTERS)
    first = ADAPTERS / "base-kd-3"
    for _ in range(2):  # what is done is done again, unless the command was killed behind it
        made = first.stat().st_ino
        process = begin("train", "base-kd")
        while not (ADAPTERS / ".partial/base-kd-20").exists() and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert first.stat().st_ino != made
        made = first.stat().st_ino
        assert main(["train", "base-kd"]) == 0
        assert first.stat().st_ino == made
        assert contents(ADAPTERS) == whole
        assert not unfinished()
