"""Stages, started twice at random offsets and killed at random moments, end in their one right result."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import contents, unfinished
from forked import SAID, begin, status, whole_seconds
from params import keep

MINI = Path("artifacts/mini")
STAGES = {  # in their order, with what each makes
    "inputs": MINI / "inputs",
    "prepare": MINI / "data",
    "head": MINI / "teacher/head",
    "teacher teacher": MINI / "teacher/teacher",
    "train teacher-kd-1": MINI / "adapters/teacher-kd-1",
    "assess teacher-kd-1": MINI / "logs/teacher-kd-1.csv",
    "statistics": MINI / "statistics.json",
    "report": MINI / "report",
    "attention": MINI / "attention",
}
BEFORE = {"inputs", "prepare", "head"}  # what those that are killed by default read


@pytest.fixture
def chain(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working folder for every stage, with one student."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny_params["dataset"] |= {"train_rows": 20, "test_rows": 6}
    tiny_params["distill"] |= {"cosine_steps": 40, "checkpoint_every": 10, "learning_rate": 0.01}
    tiny_params["assess"]["max_new_tokens"] = 20
    keep(tiny_params, "teacher-kd")
    write_params(tiny_params)


def made(target: Path) -> Any:
    return contents(target) if target.is_dir() else target.read_bytes()


def remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def start_twice_and_kill(stage: str, starts: int, kills: int, chance: random.Random) -> None:
    target, command = STAGES[stage], stage.split()
    whole_s = whole_seconds(*command)
    expected = made(target)
    for _ in range(starts):
        remove(target)
        first = begin(*command)
        time.sleep(chance.uniform(0, whole_s))
        second = begin(*command)
        ended = sorted([status(first), status(second)])
        assert ended in ([0, 0], [0, 1]), SAID.read_text()
        assert made(target) == expected, stage
        assert not unfinished()
    remove(target)
    for _ in range(kills):
        process = begin(*command)
        time.sleep(chance.uniform(0, whole_s))
        process.kill()
        process.join()
        if target.exists():  # killed behind its end, or not at all
            assert made(target) == expected, stage
            remove(target)
    assert status(begin(*command)) == 0, SAID.read_text()
    assert made(target) == expected, stage
    assert not unfinished()
    assert "Traceback" not in SAID.read_text()
    assert json.loads((MINI / "runs" / f"{stage.replace(' ', '/')}.json").read_text())["host"]


@pytest.mark.parametrize(
    ("of", "starts", "kills"),
    [
        ({"teacher teacher", "train teacher-kd-1", "assess teacher-kd-1"}, 1, 1),
        pytest.param(set(STAGES), 10, 20, marks=pytest.mark.often),
    ],
)
@pytest.mark.usefixtures("chain")
def test_started_twice_and_killed_a_stage_ends_in_its_one_result(of: set[str], starts: int, kills: int) -> None:
    chance = random.Random(0)
    for stage in STAGES:
        if stage in of:
            start_twice_and_kill(stage, starts, kills, chance)
        elif stage in BEFORE:
            assert status(begin(*stage.split())) == 0, SAID.read_text()
