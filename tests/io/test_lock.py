"""Two at once: one works, the other is told who does, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import unfinished
from conftest import environment

from kd.errors import WorkFailedError
from kd.io.distributed import Process
from kd.io.files import unfinished_folder, whole_file, whole_folder, write_text

TARGET, KEY = Path("artifacts/mini/teacher/base"), "0" * 16
HOLDS = """if True:
    import sys, time
    from pathlib import Path
    from kd.io.files import unfinished_folder, write_text
    with unfinished_folder(Path("artifacts/mini/teacher/base"), "0" * 16) as work:
        write_text(work / "a", "kept")
        print(flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that is at work."""
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def begin_unfinished(process: Process | None = None) -> None:
    with unfinished_folder(TARGET, KEY, *([process] if process else [])) as work:
        assert (work / "a").read_text() == "kept"


def test_the_second_is_told_who_is_at_work_and_since_when_and_nothing_is_lost(holder: subprocess.Popen[str]) -> None:
    with pytest.raises(WorkFailedError) as refused:
        begin_unfinished()
    assert str(refused.value).startswith(
        f"{TARGET}: process {holder.pid} on {os.uname().nodename} (kd) is at work on it"
    )
    assert f"since {time.strftime('%Y-%m-%d')}" in str(refused.value)
    holder.kill()  # which frees what it held
    holder.wait()
    begin_unfinished()


def test_an_orphan_of_a_killed_parent_is_at_work_too() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    try:
        with pytest.raises(WorkFailedError, match="is at work on it since"):
            begin_unfinished()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the orphan is of its session


def test_processes_of_one_launch_share_the_work_and_those_of_another_do_not() -> None:
    with ExitStack() as launch:
        for rank in range(2):
            work = launch.enter_context(unfinished_folder(TARGET, KEY, Process(rank, 2, rank, 2)))
        write_text(work / "a", "kept")
        for other in (Process(1, 2, 1, 2), Process(0, 1, 0, 1), Process(2, 3, 2, 3)):
            with pytest.raises(WorkFailedError, match="is at work on it"):
                begin_unfinished(other)
    begin_unfinished(Process(2, 3, 2, 3))


def test_locks_of_killed_launches_hold_nobody_up() -> None:
    bench = Path("artifacts/mini/teacher/.partial/base")
    bench.mkdir(parents=True)
    for name in ("0-of-1.lock", "1-of-4.lock"):
        (bench / name).write_text('{"pid": 1')
    with whole_folder(TARGET) as work:
        write_text(work / "a", "x")
    assert not unfinished()


def test_no_two_targets_share_a_folder_of_unfinished_work() -> None:
    targets = [Path(name) for name in ("a/b-c/d", "a/b/c-d", "a/b/c/d", "x/a/b/c/d", "d", "a/d")]
    with ExitStack() as all_at_once:
        works = [all_at_once.enter_context(whole_folder(target)) for target in targets]
        assert len(set(works)) == len(works)
        for target, work in zip(targets, works, strict=True):
            write_text(work / "which", str(target))
    assert [(target / "which").read_text() for target in targets] == [str(target) for target in targets]


def test_nothing_is_left_beside_a_finished_file() -> None:
    with whole_file(Path("sheet.csv")) as work:
        write_text(work, "x")
    assert list(Path().iterdir()) == [Path("sheet.csv")]


def test_what_cannot_be_locked_is_still_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with whole_folder(TARGET) as work:
        write_text(work / "a", "x")
    assert (TARGET / "a").read_text() == "x"
    assert "no locks on this file system; start nothing twice" in capsys.readouterr().err


def test_of_many_at_once_each_ends_with_its_result_or_is_told() -> None:
    """Also while holders come and go, and remove the folders of the locks."""
    program = """if True:
        from pathlib import Path
        from kd.errors import WorkFailedError
        from kd.io.files import whole_folder, write_text
        done = refused = 0
        while done < 50:
            try:
                with whole_folder(Path("artifacts/x")) as work:
                    write_text(work / "a", str(done))
                    write_text(work / "b", str(done))
                done += 1
            except WorkFailedError:
                refused += 1
        print(refused)
    """
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(3)]
    refused = [int(process.communicate()[0]) for process in processes]
    assert sum(refused) > 0
    assert Path("artifacts/x/a").read_text() == Path("artifacts/x/b").read_text() == "49"
    assert not unfinished()
