"""The whole pipeline through real `dvc repro`, on a tiny random Llama, in a fresh clone's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import unfinished
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

STUDENTS = {"train", "assess", "assess-untrained", "statistics"}  # what `kd students` runs side by side
FILES = ("kd", "profiles", "reviews", "dvc.yaml", ".dvcignore", ".gitignore")


def on_cpu() -> dict[str, str]:
    """The environment of the commands here, which are about DVC and start some forty processes: no GPU is visible."""
    return environment() | {"CUDA_VISIBLE_DEVICES": ""}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=on_cpu(), capture_output=True, text=True)


def repro(folder: Path, *arguments: str) -> str:
    done = run(folder, "dvc", "repro", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(said: str) -> set[str]:
    """The stages that a `dvc repro` ran."""
    return {line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")}


def write_params(folder: Path, params: dict[str, Any]) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)


def outputs(folder: Path) -> dict[str, str]:
    """Every output's path and content hash, as dvc.lock records them."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The project's files in a new Git and DVC repository, with the tiny Llama in params.yaml."""
    folder = tmp_path_factory.mktemp("clone")
    for name in FILES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"] |= {"train_rows": 8, "test_rows": 4}
    shutil.copytree(tiny_llama, folder / "llama")
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": "llama"}
    params["distill"]["cosine_steps"] = 8
    params["assess"]["max_new_tokens"] = params["untrained"]["no-distillation"]["max_new_tokens"] = 4
    keep(params, "no-distillation", "base-kd", "teacher-kd")
    write_params(folder, params)
    for command in (
        ("git", "init", "--quiet"),
        ("git", "add", "--all"),
        ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "start"),
    ):
        assert run(folder, *command).returncode == 0
    return folder


@pytest.fixture(scope="module")
def table(clone: Path) -> str:
    """What the whole pipeline prints; its results are in the clone from then on."""
    return repro(clone)


def test_the_pipeline_runs_whole_and_is_reproducible(clone: Path, table: str) -> None:
    assert "teacher-kd" in table
    results = json.loads((clone / "artifacts/mini/report/results.json").read_text())
    assert len(results["experiments"]) == 3
    assert all(result["rows"] == 4 for result in results["experiments"].values())
    first = outputs(clone)
    assert len(first) == 13  # inputs, data, head, 2 teachers, statistics, 2 adapters, 3 logs, report, attention

    assert ran(repro(clone)) == {"inputs"}

    shutil.rmtree(clone / "artifacts")
    assert ran(repro(clone)) == {"inputs"}
    assert (clone / "artifacts/mini/report/accuracy.png").exists()

    repro(clone, "--force", "--single-item", "teacher@teacher", "train@teacher-kd-1", "assess@teacher-kd-1", "report")
    assert outputs(clone) == first
    assert not unfinished(clone / "artifacts")


@pytest.mark.usefixtures("table")
def test_a_change_reruns_only_what_it_reaches(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    params = YAML(typ="safe").load(before)
    params["prompts"]["teacher"] = "Teach me. "
    write_params(clone, params)
    teacher = {"teacher@teacher", "train@teacher-kd-1", "assess@teacher-kd-1"}
    assert ran(repro(clone, "assess", "assess-untrained")) == {"inputs", *teacher}
    assert {"statistics", "report", "attention"} <= set(json.loads(run(clone, "dvc", "status", "--json").stdout))
    (clone / "params.yaml").write_text(before)
    assert ran(repro(clone)) == {"inputs"}  # what was there before is remembered


@pytest.mark.usefixtures("table")
def test_another_prompt_is_another_line(clone: Path) -> None:
    before, params, lock = outputs(clone), (clone / "params.yaml").read_text(), (clone / "dvc.lock").read_text()
    (clone / "params.yaml").write_text(params.replace("\nprompts:\n", "\nprompts:\n  socratic: 'Ask back. '\n"))
    said = repro(clone, "report")
    made = {"teacher@socratic", "train@socratic-kd-1", "assess@socratic-kd-1", "statistics", "report"}
    assert ran(said) == {"inputs", *made}
    made = {
        f"artifacts/mini/{path}" for path in ("teacher/socratic", "adapters/socratic-kd-1", "logs/socratic-kd-1.csv")
    }
    assert outputs(clone).keys() == before.keys() | made
    assert json.loads((clone / "artifacts/mini/teacher/socratic/manifest.json").read_text())["prompt"] == {
        "name": "socratic",
        "text": "Ask back. ",
    }
    assert "prompt of its teacher: Ask back." in (clone / "artifacts/mini/adapters/socratic-kd-1/README.md").read_text()
    assert "socratic-kd" in (clone / "artifacts/mini/report/results.md").read_text()
    (clone / "params.yaml").write_text(params)
    (clone / "dvc.lock").write_text(lock)  # DVC keeps in it, and on the disk, what no prompt makes any more
    for path in made:
        subprocess.run(["rm", "-r", clone / path], check=True)
    assert ran(repro(clone)) == {"inputs"}


@pytest.mark.usefixtures("table")
def test_another_seed_is_trained_and_assessed_and_nothing_else_is_done_again(clone: Path) -> None:
    params = (clone / "params.yaml").read_text()
    with_another = YAML(typ="safe").load(params)
    with_another["seeds"] = [2, 1]
    write_params(clone, with_another)
    trained = {"train@base-kd-2", "train@teacher-kd-2"}
    assert ran(repro(clone, "--dry", "train")) == {"inputs", *trained}
    changed = set(json.loads(run(clone, "dvc", "status", "--json").stdout))
    assert changed == {"inputs", *trained, "assess@base-kd-2", "assess@teacher-kd-2", "report", "attention"}
    (clone / "params.yaml").write_text(params)


def forget_students(folder: Path) -> None:
    """Undo what comes behind the teachers, in dvc.lock and in DVC's memory of what ran as well."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if name.split("@")[0] not in STUDENTS}
    with (folder / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    shutil.rmtree(folder / ".dvc/cache/runs")
    for made in ("adapters", "logs"):
        shutil.rmtree(folder / "artifacts/mini" / made)
    (folder / "artifacts/mini/statistics.json").unlink()


@pytest.mark.usefixtures("table")
def test_students_run_side_by_side_and_end_in_the_lock_of_one_after_the_other(clone: Path) -> None:
    expected = YAML(typ="safe").load(clone / "dvc.lock")
    forget_students(clone)

    command, adapters = ("python", "-m", "kd", "students", "--jobs", "2"), clone / "artifacts/mini/adapters"
    process = subprocess.Popen(command, cwd=clone, env=on_cpu(), stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert any("> python -m kd train" in line for line in process.stderr)  # which takes a second to begin
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "kd: interrupted; what is done is kept, and the same command goes on from there" in said
    assert not {path.name for path in adapters.glob("*-kd")}

    (adapters / ".partial").mkdir(parents=True, exist_ok=True)
    (adapters / ".partial/base-kd-1").touch()  # is in the way of one student
    failing = run(clone, *command)
    assert failing.returncode == 1
    assert "train@base-kd-1 failed: kd: artifacts/mini/adapters/.partial/base-kd-1: a file is where" in failing.stderr
    assert "kd: train@base-kd-1 failed, and assess@base-kd-1 could not begin without; mend" in failing.stderr
    assert outputs(clone).keys() >= {"artifacts/mini/logs/teacher-kd-1.csv", "artifacts/mini/logs/no-distillation.csv"}

    (adapters / ".partial/base-kd-1").unlink()
    going_on = run(clone, *command)
    assert going_on.returncode == 0, going_on.stderr
    assert "> python -m kd assess base-kd" in going_on.stderr
    assert "> python -m kd assess teacher-kd" not in going_on.stderr
    assert YAML(typ="safe").load(clone / "dvc.lock") == expected
    assert ran(repro(clone)) == {"inputs"}
    assert not unfinished(clone / "artifacts")


@pytest.mark.parametrize("stage", ["train@base-kd-1", "teacher@base"])
@pytest.mark.usefixtures("table")
def test_a_killed_stage_leaves_no_result_and_runs_again(clone: Path, stage: str) -> None:
    expected = outputs(clone)
    folder = {"train@base-kd-1": "adapters/base-kd-1", "teacher@base": "teacher/base"}[stage]
    md5 = expected[f"artifacts/mini/{folder}"]
    (clone / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()  # or DVC restores the result instead of running
    work = (clone / "artifacts/mini" / folder).parent / ".partial" / Path(folder).name
    process = subprocess.Popen(
        ["dvc", "repro", "--single-item", "--force", stage],
        cwd=clone,
        env=on_cpu(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not work.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert work.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (clone / "artifacts/mini" / folder).exists()
    repro(clone, "--single-item", stage)
    assert outputs(clone) == expected
    assert not unfinished(clone / "artifacts")


@pytest.mark.usefixtures("table")
def test_other_bytes_in_folders_that_params_name_run_what_reads_them_again(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    assert ran(repro(clone, "head")) == {"inputs"}
    weights = clone / "llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert ran(repro(clone, "head")) == {"inputs", "head"}

    rows = [{"question": f"How many are {i} and 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(9)]
    (clone / "gsm8k").mkdir()
    for split in ("train", "test"):
        (clone / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = YAML(typ="safe").load(before)
    rows_wanted = {key: params["dataset"][key] for key in ("train_rows", "test_rows")}
    params["dataset"] = {"source": "folder", "path": "gsm8k", "answers": "main", **rows_wanted}
    write_params(clone, params)
    assert ran(repro(clone, "prepare")) == {"inputs", "prepare"}
    assert ran(repro(clone, "prepare")) == {"inputs"}
    train = clone / "gsm8k/train.jsonl"
    train.write_text(train.read_text().replace("How many", "How much"))
    assert ran(repro(clone, "prepare")) == {"inputs", "prepare"}
    train.unlink()
    done = run(clone, "dvc", "repro", "prepare")
    assert done.returncode != 0
    assert "kd: gsm8k/train.jsonl: no such file; put it there, or name another folder" in done.stderr
    (clone / "params.yaml").write_text(before)


@pytest.mark.often
@pytest.mark.usefixtures("table")
def test_an_experiment_in_dvcs_queue_runs_its_own_copy_of_the_code(clone: Path) -> None:
    commit = (
        "git",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "commit",
        "--quiet",
        "--all",
        "--message",
        "ran",
    )
    assert run(clone, *commit).returncode == 0
    with (clone / "kd/data/gsm8k.py").open("a") as file:
        file.write("\nimport sys\n\nprint('code of', Path.cwd() == Path(__file__).parents[2], file=sys.stderr)\n")
    change = "untrained.no-distillation.max_new_tokens=3"
    assert run(clone, "dvc", "exp", "run", "--queue", "--name", "shorter", "--set-param", change).returncode == 0
    assert run(clone, "dvc", "queue", "start").returncode == 0
    deadline = time.monotonic() + 300
    while not run(clone, "dvc", "exp", "list", "--name-only").stdout.strip() and time.monotonic() < deadline:
        time.sleep(1)
    said = run(clone, "dvc", "queue", "logs", "shorter").stdout
    assert "code of True" in said
    assert "code of False" not in said
    # The code of `inputs` and `prepare` is changed, their results are not.
    assert ran(said) == {"inputs", "prepare", "assess-untrained@no-distillation", "report", "attention"}
