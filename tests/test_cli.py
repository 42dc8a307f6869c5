"""The command line as a newcomer meets it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import REPOSITORY

KD = [sys.executable, "-m", "kd.cli"]
CODE = str(REPOSITORY)
MINI = REPOSITORY / "profiles" / "mini.yaml"


def test_help_teaches_and_waits_for_no_library() -> None:
    """Nothing that takes long to import: of all modules that are not Python's own, only kd's."""
    code = """if True:
        import sys
        from kd.cli import parser
        print(parser().format_help())
        loaded = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
        sys.exit(", ".join(sorted(loaded - sys.stdlib_module_names - before)) or 0)
    """
    code = "import sys; before = {name.partition('.')[0] for name in sys.modules} | {'kd'}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "head", "teacher", "train", "assess", "report", "doctor", "models fetch"):
        assert f"kd {command}" in done.stdout
    assert "Exit status" in done.stdout


@pytest.mark.parametrize("arguments", [["--wrong"], ["teach", "base"], ["data"], ["train"], ["report", "--jsn"]])
def test_wrong_usage_exits_2_without_a_traceback(arguments: list[str]) -> None:
    done = subprocess.run([*KD, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: kd" in done.stderr
    assert "Traceback" not in done.stderr


def kd(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KD, *arguments], capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": CODE} | variables
    )


@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_what_is_where_a_folder_should_be_is_named(tmp_path: Path, what: str) -> None:
    if what == "a file":
        (tmp_path / "artifacts").write_text("")
    else:
        (tmp_path / "artifacts").symlink_to("nothing")
    done = kd("prepare", "--params", str(MINI), folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"kd: artifacts: {what} is where a folder should be; move it away\n")
    (tmp_path / "artifacts").rename(tmp_path / "away")
    assert kd("prepare", "--params", str(MINI), folder=tmp_path).returncode == 0


@pytest.mark.parametrize("command", [["prepare"], ["report"]])
def test_the_params_of_another_folders_pipeline_are_not_run_beside_it(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "dvc.yaml").touch()
    shutil.copy(MINI, tmp_path / "params.yaml")
    done = kd(*command, "--params", "../params.yaml", folder=tmp_path / "docs")
    assert done.returncode == 2
    assert (
        done.stderr == f"kd: ../params.yaml: results lie where kd is started; go to {tmp_path} and leave --params out\n"
    )
    assert not list((tmp_path / "docs").iterdir())


def test_another_checkouts_code_does_not_run_in_this_one(tmp_path: Path) -> None:
    """As in a Git worktree, or where `dvc exp` queues, with the environment of the checkout that it was made from."""
    shutil.copytree(Path(CODE) / "kd", tmp_path / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dvc.yaml").touch()
    shutil.copy(MINI, tmp_path / "params.yaml")
    kd_of_another = [sys.executable, "-P", "-c", "import sys; from kd.cli import main; sys.exit(main())", "prepare"]
    variables = os.environ | {"PYTHONPATH": CODE}
    done = subprocess.run(kd_of_another, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.returncode == 2
    assert "not the code that runs, which is" in done.stderr
    assert not (tmp_path / "artifacts").exists()
    with (tmp_path / "kd/data/gsm8k.py").open("a") as file:
        file.write("\nimport sys\nprint('changed code', file=sys.stderr)\n")
    followed = [sys.executable, "-m", "kd", "prepare"]  # the advice
    done = subprocess.run(followed, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert (done.returncode, done.stderr) == (0, "changed code\n")


def test_a_record_says_where_and_by_what_a_result_was_made_and_no_checksum_covers_it(tmp_path: Path) -> None:
    shutil.copy(MINI, tmp_path / "params.yaml")
    made = []
    for _ in range(2):
        assert kd("prepare", folder=tmp_path).returncode == 0
        record = json.loads((tmp_path / "artifacts/mini/runs/prepare.json").read_text())
        assert record["host"] == platform.node()
        assert record["command"] == "kd prepare"
        assert record["versions"]["torch"] == version("torch")
        assert datetime.fromisoformat(record["began"]) <= datetime.fromisoformat(record["ended"])
        assert re.fullmatch("[0-9a-f]{40}", record["commit"] or "0" * 40)
        made.append({path.name: path.read_bytes() for path in (tmp_path / "artifacts/mini/data").iterdir()})
    assert made[0] == made[1]


def test_sigterm_ends_a_command_as_ctrl_c_does_with_a_status_of_its_own(tmp_path: Path) -> None:
    shutil.copy(MINI, tmp_path / "params.yaml")
    code = (
        "import os, signal; from kd.data import gsm8k; from kd.cli import main; "
        "gsm8k.miniature.problems = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
        "raise SystemExit(main(['prepare']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "kd: terminated; earlier results are as they were, run the same command again\n"


def test_a_file_larger_than_the_disk_lets_it_be_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    shutil.copy(MINI, tmp_path / "params.yaml")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "  # as a full disk ends a write
        "from kd.cli import main; raise SystemExit(main(['prepare']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "kd: artifacts/mini/data: File too large; make room on that disk; then run the same command again\n"
    )
    assert kd("prepare", folder=tmp_path).returncode == 0
