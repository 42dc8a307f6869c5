"""The study: its README says what its results.json says, and its driver runs, stops and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from ruamel.yaml import YAML

from kd.cli import STUDY_ENVIRONMENT, main
from kd.study.results import read_study
from kd.study.tables import with_tables

STUDY = REPOSITORY / "studies" / "smollm2-gsm8k"
# Tables come from results.json anyway; code, links and comments hold names and commands.
NOT_PROSE = re.compile(r"<!-- table.*?<!-- end of table -->|```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)*(?![\w-])(?: ?%)?")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return read_study(STUDY / "results.json")


def leaves(value: Any) -> Iterator[str | float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    elif value is not None:
        yield value


def test_the_readmes_tables_are_those_of_results_json(results: dict[str, Any]) -> None:
    readme = (STUDY / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- table:") >= 3
    assert with_tables(readme, results) == readme


def test_every_number_in_the_readmes_prose_is_in_results_json(results: dict[str, Any]) -> None:
    numbers = [leaf for leaf in leaves(results) if not isinstance(leaf, str)] + [len(results["runs"])]
    machine = [str(leaf) for leaf in leaves([results["versions"], results["hardware"]])]

    def is_there(number: str) -> bool:
        if any(number in re.findall(r"[\d.]+", text) for text in machine):
            return True
        if number.count(".") > 1:
            return False
        plain = number.rstrip(" %")
        digits = len(plain.partition(".")[2]) + (2 if "%" in number else 0)
        value = float(plain) / (100 if "%" in number else 1)
        if not digits:  # a count: rounding would find it anywhere
            return value in numbers
        return any(round(leaf, digits) == pytest.approx(value, abs=1e-12) for leaf in numbers)

    prose = NOT_PROSE.sub(" ", (STUDY / "README.md").read_text(encoding="utf-8"))
    said = NUMBER.findall(prose)
    assert len(said) > 20
    assert [number for number in said if not is_there(number)] == []
    assert not is_there("0.123456")


def test_results_json_is_small_and_the_logs_are_not_in_git(results: dict[str, Any]) -> None:
    assert (STUDY / "results.json").stat().st_size <= 2_000_000
    assert (STUDY / "logs.dvc").exists()
    kept = subprocess.run(["git", "ls-files", "logs"], cwd=STUDY, capture_output=True, text=True, check=False)
    assert kept.stdout == ""
    assert all(len(run["files"]["log"]) == 64 for run in results["runs"])


@pytest.fixture
def small(tmp_path: Path, tiny_llama: Path) -> list[str]:
    """The study with two conditions, one seed, the tiny Llama and a handful of rows: the driver's arguments for it."""
    params, conditions = (YAML(typ="safe").load(STUDY / f"{name}.yaml") for name in ("params", "conditions"))
    params["dataset"] |= {"train_rows": 6, "test_rows": 4}
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(tiny_llama)}
    params["distill"] |= {"cosine_steps": 12, "checkpoint_every": 4}
    params["assess"]["max_new_tokens"] = 4
    conditions["seeds"] = [1]
    conditions["teachers"] = {"self": {"adapters": ["base-kd"], "search": "base-kd"}}
    conditions["untrained"] = {"self": {"experiments": ["no-distillation-matched"]}}
    conditions["conditions"] = {"aligned": {}}
    conditions["reference"] = {"quirks": {"condition": "aligned", "experiment": "base-kd"}, "conditions": {}}
    rows = "".join(
        json.dumps({"question": f"Tom has {i} apples and buys {i}. How many now?", "answer": f"{i}+{i}\n#### {2 * i}"})
        + "\n"
        for i in range(1, 9)
    )
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    YAML().dump(params, tmp_path / "params.yaml")
    YAML().dump(conditions, tmp_path / "conditions.yaml")
    return [str(tmp_path), "--work", str(tmp_path / "work"), "--gsm8k", str(tmp_path)]


def driver(*arguments: str) -> subprocess.Popen[str]:
    """`kd study`, on the CPU: what is tested is the driver, which starts many processes."""
    command = [sys.executable, "-m", "kd.cli", "study", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_the_driver_stops_when_told_goes_on_and_ends_in_results(small: list[str], tmp_path: Path) -> None:
    first = driver("run", *small)
    teacher = tmp_path / "work/artifacts/capture-aligned-self/teacher/base"
    deadline = time.monotonic() + 120
    while not teacher.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 143
    assert "the same command goes on" in said
    captured = teacher.stat().st_mtime_ns

    second = driver("run", *small)
    _, said = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert teacher.stat().st_mtime_ns == captured
    shutil.rmtree(teacher.parent)  # what only runs that are over needed may go
    assert run_to_end("run", *small)[0] == 0
    assert not teacher.exists()
    third = driver("results", *small)
    _, said = third.communicate(timeout=60)
    assert third.returncode == 0, said
    study = read_study(tmp_path / "results.json")
    rows = [(run["condition"], run["experiment"], run["seed"]) for run in study["runs"]]
    assert rows == [("untrained", "no-distillation-matched", None), ("aligned", "base-kd", 1)]
    assert study["starting_divergence"]["self"]["base"] == pytest.approx(0, abs=1e-6)
    assert len(list((tmp_path / "logs").glob("*.csv.xz"))) == 2


def test_a_student_that_diverges_is_named_and_the_study_ends(small: list[str], tmp_path: Path) -> None:
    edit(tmp_path / "conditions.yaml", "conditions", {"aligned": {"params": {"distill.learning_rate": 1e30}}})
    status, said = run_to_end("run", *small)
    assert (status, "aligned-self-s1/base-kd diverged in training and is not assessed" in said) == (0, True)
    assert run_to_end("run", *small)[0] == 0
    status, said = run_to_end("results", *small)
    assert (status, "diverged in training, and so in no table: aligned-self-s1/base-kd" in said) == (0, True)
    study = read_study(tmp_path / "results.json")
    assert (len(study["runs"]), study["planned"], study["diverged"]) == (1, 2, ["aligned-self-s1/base-kd"])


def test_what_has_changed_since_is_not_taken_for_the_same(small: list[str], tmp_path: Path) -> None:
    assert run_to_end("task", *small, "data")[0] == 0
    edit(tmp_path / "params.yaml", "assess", {"batch_tokens": 64, "max_new_tokens": 4})
    status, said = run_to_end("task", *small, "data")
    assert (status, "data-self.yaml: conditions.yaml or params.yaml changed since" in said) == (2, True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("teachers", {"self": {"adapters": ["base"], "search": "base-kd"}}, "base: unknown adapter, expected one of"),
        ("conditions", {"aligned": {"searched": ["rate"]}}, "conditions.aligned.searched.0: "),
        (
            "conditions",
            {"aligned": {"params": {"distil.alpha": 1}}},
            "distil.alpha: params.yaml has no mapping",
        ),
        ("conditions", {"published": {}}, "reference: aligned: no such condition; one of published"),
        ("seeds", [], "seeds: "),
        ("seeds", [1, 1], "seeds: one is there twice"),
    ],
)
def test_what_conditions_yaml_names_has_to_be_there(
    small: list[str], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    edit(tmp_path / "conditions.yaml", key, value)
    status, said = run_to_end("run", *small)
    assert (status, "Traceback" in said) == (2, False)
    assert message in said


def edit(path: Path, key: str, value: Any) -> None:
    document = YAML(typ="safe").load(path)
    YAML().dump(document | {key: value}, path)


def test_the_driver_says_what_is_wrong(small: list[str], tmp_path: Path) -> None:
    status, said = run_to_end("task", *small, "nothing")
    assert (status, "nothing: no such task; one of data, capture-aligned-self, " in said) == (2, True)
    status, said = run_to_end("results", *small)
    assert (status, "no run is done; `kd study run studies/" in said) == (2, True)
    status, said = run_to_end("run", *small[:-1], str(tmp_path / "nowhere"))
    assert (status, "nowhere: no such folder; name the one that holds train.jsonl" in said) == (2, True)
    (tmp_path / "conditions.yaml").unlink()
    status, said = run_to_end("run", *small)
    assert (status, "conditions.yaml: no such file" in said) == (2, True)


def test_a_disk_without_links_is_refused_and_another_taken(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name, value in STUDY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as without:
        without.setattr(os, "symlink", refused)
        assert main(["study", "task", *small, "aligned-self-s1/base-kd"]) == 2
    said = capsys.readouterr().err
    assert "share data and teachers by links, which this disk does not take (Operation not permitted); name a" in said
    small[2] = str(tmp_path / "another disk")
    assert main(["study", "task", *small, "data"]) == 0


def run_to_end(*arguments: str) -> tuple[int, str]:
    process = driver(*arguments)
    _, said = process.communicate(timeout=240)
    return process.returncode, said
