"""The stages by the command line, on a GPU, alone and by several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import begin, contents
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

from kd.cli import main

pytestmark = pytest.mark.usefixtures("gpu")

Write = Callable[[dict[str, Any]], None]
MINI = Path("artifacts/mini")
CARDS = """
from kd.io.distributed import take_gpus, this_process
take_gpus(this_process())
import torch
torch.ones(1, device="cuda")
import os
print(os.environ.get("CUDA_VISIBLE_DEVICES", "all"), torch.cuda.device_count())
"""


@pytest.fixture
def small(gpu_params: dict[str, Any], write_params: Write) -> dict[str, Any]:
    """Params with one teacher's prompt, two students and three rows of the table."""
    keep(gpu_params, "no-distillation", "fine-tuning", "teacher-kd")
    gpu_params["student"]["dtype"] = "bfloat16"
    write_params(gpu_params)
    return gpu_params


@pytest.mark.usefixtures("small")
def test_the_whole_chain_ends_in_its_table() -> None:
    stages = "prepare/head/teacher teacher/statistics/train fine-tuning/train teacher-kd"
    stages += "/assess no-distillation/assess fine-tuning/assess teacher-kd/report/attention"
    for stage in stages.split("/"):
        assert main(stage.split()) == 0
    results = json.loads((MINI / "report/results.json").read_text())
    assert set(results["experiments"]) == {"no-distillation", "fine-tuning", "teacher-kd"}
    assert (MINI / "report/index.html").stat().st_size > 10_000
    assert {path.suffix for path in (MINI / "attention").rglob("*") if path.is_file()} == {".csv", ".png", ".svg"}
    assert main(["measure", "teacher-kd"]) == 0


def pair(*arguments: str) -> None:
    """`kd` as two processes at once, which share the GPUs."""
    processes = [begin(*arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said


@pytest.mark.usefixtures("small")
def test_two_processes_capture_and_assess_as_one_does() -> None:
    for stage in (["prepare"], ["head"], ["teacher", "teacher"], ["assess", "no-distillation"]):
        assert main(stage) == 0
    store, log = MINI / "teacher/teacher", MINI / "logs/no-distillation.csv"
    alone = contents(store), log.read_bytes()
    shutil.rmtree(store)
    log.unlink()
    pair("teacher", "teacher")
    pair("assess", "no-distillation")
    assert (contents(store), log.read_bytes()) == alone


def test_two_processes_take_the_gpus_between_them() -> None:
    count = torch.cuda.device_count()
    found = []
    for rank in range(2):
        variables = environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = subprocess.run([sys.executable, "-c", CARDS], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    if count == 1:
        assert [cards for _, cards in found] == ["1", "1"]  # it is shared
    else:
        named = [visible.split(",") for visible, _ in found]
        assert [len(cards) for cards in named] == [int(cards) for _, cards in found]
        assert sorted(named[0] + named[1]) == sorted(map(str, range(count)))


def test_students_take_a_gpu_each(small: dict[str, Any], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    small["dataset"] |= {"train_rows": 4, "test_rows": 4}
    YAML().dump(small, tmp_path / "params.yaml")
    shutil.copytree(REPOSITORY / "kd", "kd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "reviews", "reviews")
    shutil.copy(REPOSITORY / "dvc.yaml", "dvc.yaml")
    init = [sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"]
    subprocess.run(init, env=environment(), check=True)
    # Each stage's process says which GPUs it has, and how many threads: Python runs this module before anything else.
    Path("sitecustomize.py").write_text(
        "import os, sys\nif sys.orig_argv[1:3] == ['-m', 'kd']:\n"
        "    print('sees', os.environ.get('OMP_NUM_THREADS'), os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
    )
    first = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = environment() | {"PYTHONPATH": first}
    command = [sys.executable, "-m", "kd", "students", "--jobs", "2"]
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stderr.splitlines() if " | sees " in line]
    seen = {line[0]: line[-1] for line in told}
    assert {int(line[-2]) for line in told} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert {stage for stage in seen if stage.startswith("train")} == {
        "train@teacher-kd-1",
        "train-control@fine-tuning-1",
    }
    assert len({gpu for stage, gpu in seen.items() if stage.startswith("train")}) == 2
    assert all(gpu.isdecimal() for gpu in seen.values())
    assert (MINI / "logs/teacher-kd-1.csv").exists()
