"""A capture that is killed, fails or is spread over processes ends in the same bytes as one that is not."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import chdir
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import unfinished
from conftest import make_tiny_params
from forked import begin, status
from ruamel.yaml import YAML

from kd.cli import main
from kd.errors import UserError, WorkFailedError
from kd.io import distributed
from kd.io.distributed import Process, take_gpus, this_process, wait_for_others
from kd.store import shards, writer
from kd.store.reader import TeacherStore
from kd.store.writer import StoreWriter
from kd.teacher.backends.transformers import TransformersTeacher

STORE = Path("artifacts/mini/teacher/base")
PARTIAL = Path("artifacts/mini/teacher/.partial/base")


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a folder ready to capture seven shards."""
    params = make_tiny_params(tiny_llama)
    params["dataset"]["train_rows"] = 13
    with chdir(tmp_path_factory.mktemp("prepared")):
        YAML().dump(params, Path("params.yaml"))
        for command in ("prepare", "head"):
            assert main([command]) == 0
        return Path("artifacts").absolute()


@pytest.fixture
def ready(
    prepared: Path,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """A working folder that is a copy of it; its params."""
    monkeypatch.setattr(writer, "SHARD_EXAMPLES", 2)
    tiny_params["dataset"]["train_rows"] = 13
    write_params(tiny_params)
    shutil.copytree(prepared, "artifacts")
    return tiny_params


@pytest.fixture
def expected(ready: dict[str, Any]) -> dict[str, bytes]:
    """The files of an uninterrupted capture, which is removed again."""
    del ready
    assert main(["teacher", "base"]) == 0
    found = captured()
    shutil.rmtree(STORE)
    return found


def captured() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in STORE.iterdir()}


def shards_there() -> int:
    """How many, also while a process puts their folder in place, where Path.glob would fail."""
    return sum(name.startswith("states-") for _, _, names in os.walk(PARTIAL) for name in names)


def two_examples_a_shard() -> None:
    writer.SHARD_EXAMPLES = 2


def capture(**variables: str) -> BaseProcess:
    """`kd teacher base`, begun, as a process of its own."""
    return begin("teacher", "base", first=two_examples_a_shard, **variables)


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.often)])
@pytest.mark.usefixtures("on_cpu")
def test_killed_at_random_points_the_next_runs_end_in_the_same_bytes(expected: dict[str, bytes], kills: int) -> None:
    """Killed again and again until it comes through, and started over until it was killed enough."""
    chance, killed, resumed = random.Random(0), 0, 0
    while killed < kills:
        while not STORE.exists():
            resumed += bool(shards_there())
            process = capture()
            if killed < kills:
                more = shards_there() + chance.randrange(3)
                while process.is_alive() and shards_there() < more:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.02))
                process.kill()
            killed += status(process) == -signal.SIGKILL
        assert captured() == expected
        assert status(capture()) == 0  # clears what one leaves that was killed behind its end
        assert captured() == expected
        assert not unfinished()
        shutil.rmtree(STORE)
    assert resumed > 2  # or nothing was ever left to go on with


@pytest.mark.usefixtures("on_cpu")
def test_two_processes_make_the_same_store_as_one(expected: dict[str, bytes]) -> None:
    processes = [capture(RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [status(process) for process in processes] == [0, 0]
    assert captured() == expected
    late = capture(SLURM_PROCID="1", SLURM_NTASKS="2")  # its part is done and in place
    assert status(late) == 0
    assert not unfinished()


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def gpu_fault(*_: object) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure\nFor debugging consider ...")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "method", "failure", "status", "message"),
    [
        (
            shards,
            "write_tensors",
            no_space,
            1,
            "No space left on device; make room on that disk; 3 of 7 shards are kept in",
        ),
        (TransformersTeacher, "forward", gpu_fault, 1, "CUDA error: unspecified launch failure For debugging consider"),
        (
            TransformersTeacher,
            "forward",
            interrupt,
            130,
            "interrupted; 3 of 7 shards are kept in artifacts/mini/teacher/.partial/base/",
        ),
    ],
)
def test_a_failure_says_what_is_kept_and_the_same_command_goes_on(
    owner: Any,
    method: str,
    failure: Callable[..., None],
    status: int,
    message: str,
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, original = 0, getattr(owner, method)

    def fails_in_the_fourth_shard(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (3 if owner is shards else 6):
            failure()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, fails_in_the_fourth_shard)
        assert main(["teacher", "base"]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "the same command goes on from there" in error
    assert not STORE.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in PARTIAL.glob("*/states-*.safetensors")}
    assert len(kept) == 3
    assert main(["teacher", "base"]) == 0
    assert captured() == expected
    assert {name: (STORE / name).stat().st_mtime_ns for name in kept} == kept  # not captured again
    assert not unfinished()


def test_what_was_begun_with_other_params_is_not_gone_on_with(
    ready: dict[str, Any],
    expected: dict[str, bytes],
    write_params: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", interrupt)
        write_params(ready | {"teacher": ready["teacher"] | {"batch_rows": 2}})
        assert main(["teacher", "base"]) == 130
    assert len(list(PARTIAL.iterdir())) == 1
    write_params(ready)
    assert main(["teacher", "base"]) == 0
    assert captured() == expected
    assert not unfinished()
    write_params(ready | {"teacher": ready["teacher"] | {"batch_rows": 2}})
    assert main(["teacher", "base"]) == 0
    assert TeacherStore(STORE).manifest.batch_rows == 2


def test_a_whole_store_is_left_alone_and_a_damaged_one_captured_again(
    expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher", "base"]) == 0
    shard = STORE / "states-00003.safetensors"
    before = shard.stat().st_mtime_ns
    assert main(["teacher", "base"]) == 0
    assert "is there and right" in capsys.readouterr().err
    assert shard.stat().st_mtime_ns == before
    shard.write_bytes(bytes(len(expected[shard.name])))
    assert main(["teacher", "base"]) == 0
    assert captured() == expected


@pytest.mark.parametrize("count", [0, 1, 7, 83])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_parts_are_every_item_once(count: int, world: int) -> None:
    parts = [Process(rank, world, rank, world).part(count) for rank in range(world)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_launcher_says_which_process_this_is() -> None:
    assert this_process({}) == Process(0, 1, 0, 1)
    assert this_process({"RANK": "1", "WORLD_SIZE": "4"}) == Process(1, 4, 1, 4)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "SLURM_PROCID": "0"}
    assert this_process(torchrun) == Process(5, 8, 1, 4)
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}
    assert this_process(slurm) == Process(2, 4, 0, 2)
    with pytest.raises(UserError, match="RANK is 2 where WORLD_SIZE is 2; ranks count from 0 to 1"):
        this_process({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        this_process({"RANK": "1", "WORLD_SIZE": "two"})
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        with pytest.raises(UserError, match=f"{name} is set and {other} is not; a launcher sets both"):
            this_process({name: "1"})
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # srun alone starts four
    assert this_process(script) == Process(0, 1, 0, 1)
    assert this_process(script | {"SLURM_STEP_ID": "0"}) == Process(0, 4, 0, 4)


@pytest.mark.usefixtures("expected")
def test_a_shard_is_read_back_before_another_process_can_take_it_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process moves the folder once every shard is there, so a shard must not be looked at behind that."""
    seen = []
    original = shards.read_back

    def looks(path: Path) -> Any:
        seen.append(path.suffix)
        assert not path.with_suffix(".safetensors").exists()
        return original(path)

    monkeypatch.setattr(shards, "read_back", looks)
    assert main(["teacher", "base"]) == 0
    assert seen == [".part"] * 7


def test_each_process_takes_its_share_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, local, local_world, expected in (
        ("", 0, 1, ""),
        ("", 1, 2, "2,3"),
        ("4,5,6,7", 0, 2, "4,5"),
        ("", 5, 8, "2"),
        ("", 0, 8, "0"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        take_gpus(Process(0, local_world, local, local_world))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_waiting_for_processes_that_ended_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "POLL_S", 0)
    wait_for_others(iter([3, 3, 1, 0]).__next__, "teacher, base")
    monkeypatch.setattr(distributed, "STALL_S", 0)
    with pytest.raises(WorkFailedError, match="2 of their shards are missing"):
        wait_for_others(lambda: 2, "teacher, base")
