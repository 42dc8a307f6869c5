"""Stages, started twice at random offsets and killed at random moments, end in their one right result."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import contents, unfinished
from params import keep

from kd.cli import main

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


@pytest.fixture
def chain(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working folder for every stage, with one student."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU's libraries do not live through a fork
    tiny_params["dataset"] |= {"train_rows": 20, "test_rows": 6}
    tiny_params["distill"] |= {"cosine_steps": 40, "checkpoint_every": 10, "learning_rate": 0.01}
    tiny_params["assess"]["max_new_tokens"] = 20
    keep(tiny_params, "teacher-kd")
    write_params(tiny_params)


def in_a_fresh_process(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` where torch has no threads yet, so that it can fork; an assertion that fails there fails here."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def fork(stage: str) -> int:
    """Start a stage with everything imported already; the process's id."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    os._exit(main(stage.split()))


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said() -> str:
    return Path("said").read_text()


def made(target: Path) -> Any:
    return contents(target) if target.is_dir() else target.read_bytes()


def remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def start_twice_and_kill(stage: str, starts: int, kills: int, chance: random.Random) -> None:
    target = STAGES[stage]
    began = time.monotonic()
    assert status(fork(stage)) == 0, said()
    whole_s = time.monotonic() - began
    expected = made(target)
    for _ in range(starts):
        remove(target)
        first = fork(stage)
        time.sleep(chance.uniform(0, whole_s))
        second = fork(stage)
        ended = sorted([status(first), status(second)])
        assert ended in ([0, 0], [0, 1]), said()
        assert made(target) == expected, stage
        assert not unfinished()
    remove(target)
    for _ in range(kills):
        child = fork(stage)
        time.sleep(chance.uniform(0, whole_s))
        os.kill(child, signal.SIGKILL)
        status(child)
        if target.exists():  # killed behind its end, or not at all
            assert made(target) == expected, stage
            remove(target)
    assert status(fork(stage)) == 0, said()
    assert made(target) == expected, stage
    assert not unfinished()
    assert "Traceback" not in said()
    assert json.loads((MINI / "runs" / f"{stage.replace(' ', '/')}.json").read_text())["host"]


def every_stage(of: set[str], starts: int, kills: int) -> None:
    for module in ("dvclive", "matplotlib.pyplot", "peft", "torch._dynamo", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # before the forks, not in each of them
    torch.set_num_threads(1)
    chance = random.Random(0)
    for stage in STAGES:
        if stage in of:
            start_twice_and_kill(stage, starts, kills, chance)
        else:
            assert status(fork(stage)) == 0, said()


@pytest.mark.parametrize(
    ("of", "starts", "kills"),
    [
        ({"teacher teacher", "train teacher-kd-1", "assess teacher-kd-1"}, 1, 1),
        pytest.param(set(STAGES), 10, 20, marks=pytest.mark.often),
    ],
)
@pytest.mark.usefixtures("chain")
def test_started_twice_and_killed_a_stage_ends_in_its_one_result(of: set[str], starts: int, kills: int) -> None:
    in_a_fresh_process(every_stage, of, starts, kills)
