"""The command line as a newcomer meets it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

KD = [sys.executable, "-m", "kd.cli"]


def test_help_teaches_and_starts_in_under_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*KD, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert sorted(times)[1] < 1
    for command in ("prepare", "head", "teacher", "train", "assess", "report", "doctor", "models fetch"):
        assert f"kd {command}" in done.stdout
    assert "Exit status" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--wrong"], ["teach", "base"], ["train"], ["report", "--jsn"]])
def test_wrong_usage_exits_2_without_a_traceback(arguments: list[str]) -> None:
    done = subprocess.run([*KD, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: kd" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_ends_with_1_and_a_sentence(tmp_path: Path) -> None:
    params = Path(__file__).parent.parent / "profiles" / "mini.yaml"
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    done = subprocess.run([*KD, "prepare", "--params", str(params)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("kd: ")
    assert "Traceback" not in done.stderr
