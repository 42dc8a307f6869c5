"""The pipeline through real `dvc repro`, on a tiny random Llama, in a fresh clone's place.

It is run whole once, by stages that need not load their libraries. What DVC makes of a change is seen where a stand-in
does the work of every stage that loads a library for seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import unfinished
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

MINI = "artifacts/mini"
FILES = ("kd", "profiles", "reviews", "dvc.yaml", ".dvcignore", ".gitignore")

# Read by every Python as it starts: for these stages it makes, at once, what only the stage's name and params change.
STAND_IN = """
import hashlib, os, signal, sys, time
from pathlib import Path

MAKES = {
    "head": "teacher/head", "teacher": "teacher/{}", "statistics": "statistics.json", "train": "adapters/{}",
    "assess": "logs/{}.csv", "report": "report", "attention": "attention",
}
if sys.orig_argv[1:3] == ["-m", "kd"] and sys.orig_argv[3] in MAKES:
    stage = " ".join(sys.orig_argv[3:])
    if stage == os.environ.get("SLOW"):
        missed = iter(["what was that?"] * int(os.environ.get("MISSES", "0")))
        signal.signal(signal.SIGINT, lambda *_: print(next(missed, None) or os._exit(130), flush=True))
        Path("slow").touch()
        print("at it", flush=True)
        time.sleep(60)
    if stage == os.environ.get("FAILS"):
        print("no luck today", file=sys.stderr, flush=True)
        os._exit(1)
    made = Path("artifacts/mini", MAKES[sys.orig_argv[3]].format(*sys.orig_argv[4:]))
    file = made if made.suffix else made / "made"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(hashlib.sha256(stage.encode() + Path("params.yaml").read_bytes()).hexdigest())
    os._exit(0)
"""


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick: Path) -> Iterator[None]:
    """Let `python -m kd` and `python -m dvc` begin at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(quick))
        yield


def begin(folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    """A command in a clone, begun; on the CPU, for it is about DVC. Where the clone has a stand-in, that is used."""
    path = f"{folder / 'stand-in'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    variables |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    if command[0] == "dvc":
        command = ("python", "-m", *command)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = begin(folder, *command, **variables)
    output, said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, said)


def repro(folder: Path, *arguments: str) -> str:
    done = run(folder, "dvc", "repro", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(said: str) -> set[str]:
    """The stages that a `dvc repro` ran."""
    return {line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")}


def changed(folder: Path) -> set[str]:
    """The stages of which DVC says that something is changed."""
    return set(json.loads(run(folder, "dvc", "status", "--json").stdout))


def write_params(folder: Path, params: dict[str, Any]) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(params, file)


def outputs(folder: Path) -> dict[str, str]:
    """Every output's path and content hash, as dvc.lock records them."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def make_clone(folder: Path, llama: Path, *students: str) -> Path:
    """The project's files in a new Git and DVC repository, with a Llama and these students in params.yaml."""
    for name in FILES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"] |= {"train_rows": 8, "test_rows": 4}
    shutil.copytree(llama, folder / "llama")
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": "llama"}
    params["distill"] |= {"cosine_steps": 8, "dropouts": {}}
    params["assess"]["max_new_tokens"] = params["untrained"]["no-distillation"]["max_new_tokens"] = 4
    params["prompts"]["socratic"] = "Ask back. "
    keep(params, *students)
    write_params(folder, params)
    for command in (
        ("git", "init", "--quiet"),
        ("git", "add", "--all"),
        ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "start"),
    ):
        assert run(folder, *command).returncode == 0
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A clone with a student that has a teacher, of a prompt that no profile has, and an untrained one."""
    return make_clone(tmp_path_factory.mktemp("clone"), tiny_llama, "no-distillation", "socratic-kd")


@pytest.fixture(scope="module")
def table(clone: Path) -> str:
    """What the whole pipeline prints; its results are in the clone from then on."""
    return repro(clone)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A clone of three students, with a stand-in, in which everything is made, one stage after the other."""
    folder = make_clone(tmp_path_factory.mktemp("made"), tiny_llama, "no-distillation", "base-kd", "teacher-kd")
    (folder / "stand-in").mkdir()
    (folder / "stand-in/sitecustomize.py").write_text(STAND_IN)
    repro(folder)
    return folder


def test_the_pipeline_runs_whole_and_is_reproducible(clone: Path, table: str) -> None:
    assert "socratic-kd" in table
    results = json.loads((clone / MINI / "report/results.json").read_text())
    assert {name: one["rows"] for name, one in results["experiments"].items()} == {
        "no-distillation": 4,
        "socratic-kd": 4,
    }
    teacher = json.loads((clone / MINI / "teacher/socratic/manifest.json").read_text())
    assert teacher["prompt"] == {"name": "socratic", "text": "Ask back. "}
    assert "prompt of its teacher: Ask back." in (clone / MINI / "adapters/socratic-kd-1/README.md").read_text()
    first = outputs(clone)
    assert len(first) == 10  # inputs, data, head, teacher, statistics, adapter, 2 logs, report, attention

    shutil.rmtree(clone / "artifacts")
    assert ran(repro(clone)) == {"inputs"}
    assert (clone / MINI / "report/accuracy.png").exists()

    repro(clone, "--force", "--single-item", "report")  # others in two processes: the tests of the stages
    assert outputs(clone) == first
    assert not unfinished(clone / "artifacts")


def kill_and_run_again(folder: Path, stage: str, target: Path, begun: Callable[[], bool], **variables: str) -> None:
    """Kill a stage with its DVC once it is at work; it leaves no result, and DVC runs it again as if nothing were."""
    expected = outputs(folder)
    md5 = expected[target.relative_to(folder).as_posix()]
    (folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()  # or DVC restores the result instead of running
    process = begin(folder, "dvc", "repro", "--single-item", "--force", stage, **variables)
    deadline = time.monotonic() + 60
    while not begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert begun()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert ran(repro(folder, "--single-item", stage)) == {stage}
    assert outputs(folder) == expected
    assert not unfinished(folder / "artifacts")


def test_a_killed_stage_leaves_no_result_and_runs_again(made: Path) -> None:
    """What DVC makes of it; what a stage killed anywhere makes of it, its own tests and the next show."""
    slow = made / "slow"
    kill_and_run_again(made, "train@base-kd-1", made / MINI / "adapters/base-kd-1", slow.exists, SLOW="train base-kd-1")
    slow.unlink()


@pytest.mark.often
@pytest.mark.parametrize(
    ("stage", "makes"), [("train@socratic-kd-1", "adapters/socratic-kd-1"), ("teacher@socratic", "teacher/socratic")]
)
@pytest.mark.usefixtures("table")
def test_a_killed_stage_that_loads_a_model_runs_again(clone: Path, stage: str, makes: str) -> None:
    target = clone / MINI / makes
    kill_and_run_again(clone, stage, target, (target.parent / ".partial" / target.name).exists)


def test_a_change_reruns_only_what_it_reaches(made: Path) -> None:
    first, params = outputs(made), (made / "params.yaml").read_text()
    change = YAML(typ="safe").load(params)
    change["prompts"]["teacher"] = "Teach me. "
    write_params(made, change)
    teacher = {"teacher@teacher", "train@teacher-kd-1", "assess@teacher-kd-1"}
    assert ran(repro(made, "assess", "assess-untrained")) == {"inputs", *teacher}
    assert {"statistics", "report", "attention"} <= changed(made)
    (made / "params.yaml").write_text(params)
    assert ran(repro(made)) == {"inputs"}  # what was there before is remembered
    assert outputs(made) == first


def test_another_prompt_is_another_line(made: Path) -> None:
    before, params, lock = outputs(made), (made / "params.yaml").read_text(), (made / "dvc.lock").read_text()
    (made / "params.yaml").write_text(params.replace("\nprompts:\n", "\nprompts:\n  socratic: 'Ask back. '\n"))
    line = {"teacher@socratic", "train@socratic-kd-1", "assess@socratic-kd-1"}
    assert ran(repro(made)) == {"inputs", *line, "statistics", "report", "attention"}
    new = {f"{MINI}/{path}" for path in ("teacher/socratic", "adapters/socratic-kd-1", "logs/socratic-kd-1.csv")}
    assert outputs(made).keys() == before.keys() | new
    (made / "params.yaml").write_text(params)
    (made / "dvc.lock").write_text(lock)  # DVC keeps in it, and on the disk, what no prompt makes any more
    for path in new:
        subprocess.run(["rm", "-r", made / path], check=True)
    assert run(made, "dvc", "checkout", "--force").returncode == 0


def test_another_seed_is_trained_and_assessed_and_nothing_else_is_done_again(made: Path) -> None:
    params = (made / "params.yaml").read_text()
    with_another = YAML(typ="safe").load(params)
    with_another["seeds"] = [2, 1]
    write_params(made, with_another)
    trained, assessed = ({f"{stage}@{prompt}-kd-2" for prompt in ("base", "teacher")} for stage in ("train", "assess"))
    assert ran(repro(made, "--dry", "train")) == {"inputs", *trained}
    assert changed(made) == {"inputs", *trained, *assessed, "report", "attention"}
    (made / "params.yaml").write_text(params)


def forget_students(folder: Path) -> None:
    """Undo training and what comes behind it, in dvc.lock and in DVC's memory of what ran as well."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    undone = {name for name in lock["stages"] if name.partition("@")[0] in ("train", "assess")}
    for name in undone:
        subprocess.run(["rm", "-r", folder / lock["stages"].pop(name)["outs"][0]["path"]], check=True)
    with (folder / "dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    shutil.rmtree(folder / ".dvc/cache/runs")


def test_students_run_side_by_side_and_end_in_the_lock_of_one_after_the_other(made: Path) -> None:
    expected = YAML(typ="safe").load(made / "dvc.lock")
    forget_students(made)

    command, adapters = ("python", "-m", "kd", "students", "--jobs", "2"), made / MINI / "adapters"
    process = begin(made, *command, SLOW="train base-kd-1")
    assert process.stderr
    assert any("> python -m kd train base-kd-1" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "kd: interrupted; what is done is kept, and the same command goes on from there" in said
    assert not (adapters / "base-kd-1").exists()

    process = begin(made, *command, SLOW="train base-kd-1", MISSES="1")
    for line in ("at it", "what was that?"):
        assert process.stderr
        assert any(line in said for said in process.stderr)
        process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert not (adapters / "base-kd-1").exists()

    failing = run(made, *command, FAILS="train base-kd-1")
    assert failing.returncode == 1
    assert "train@base-kd-1 failed: no luck today" in failing.stderr
    assert "kd: train@base-kd-1 failed, and assess@base-kd-1 could not begin without; mend" in failing.stderr
    assert f"{MINI}/logs/teacher-kd-1.csv" in outputs(made)

    going_on = run(made, *command)
    assert going_on.returncode == 0, going_on.stderr
    assert "> python -m kd assess base-kd-1" in going_on.stderr
    assert "> python -m kd assess teacher-kd-1" not in going_on.stderr
    assert YAML(typ="safe").load(made / "dvc.lock") == expected


def test_other_bytes_in_folders_that_params_name_run_what_reads_them_again(made: Path) -> None:
    before = (made / "params.yaml").read_text()
    weights = made / "llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert ran(repro(made, "head")) == {"inputs", "head"}

    rows = [{"question": f"How many are {i} and 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(9)]
    (made / "gsm8k").mkdir()
    for split in ("train", "test"):
        (made / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = YAML(typ="safe").load(before)
    rows_wanted = {key: params["dataset"][key] for key in ("train_rows", "test_rows")}
    params["dataset"] = {"source": "folder", "path": "gsm8k", "answers": "main", **rows_wanted}
    write_params(made, params)
    assert ran(repro(made, "prepare")) == {"inputs", "prepare"}
    train = made / "gsm8k/train.jsonl"
    train.write_text(train.read_text().replace("How many", "How much"))
    assert ran(repro(made, "prepare")) == {"inputs", "prepare"}
    train.unlink()
    done = run(made, "dvc", "repro", "prepare")
    assert done.returncode != 0
    assert "kd: gsm8k/train.jsonl: no such file; put it there, or name another folder" in done.stderr
    (made / "params.yaml").write_text(before)


@pytest.mark.often
@pytest.mark.usefixtures("table")
def test_an_experiment_in_dvcs_queue_runs_its_own_copy_of_the_code(clone: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    assert run(clone, "git", *identity, "commit", "--quiet", "--all", "--message", "ran").returncode == 0
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
