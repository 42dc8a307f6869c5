"""Whole or absent: what a crash, a failure and a second run leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import unfinished

from kd.io.files import resumable_folder, whole_file, whole_folder, write_text, write_whole_file


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_folder_appears_when_it_is_whole() -> None:
    target = Path("artifacts/x")
    with whole_folder(target) as work:
        write_text(work / "a", "one")
        assert not target.exists()
    assert (target / "a").read_text() == "one"
    assert not unfinished()


def test_failure_keeps_the_earlier_folder() -> None:
    target = Path("artifacts/x")
    with whole_folder(target) as work:
        write_text(work / "a", "one")
    with pytest.raises(ZeroDivisionError), whole_folder(target) as work:
        write_text(work / "a", str(1 // 0))
    assert (target / "a").read_text() == "one"


def test_second_run_replaces_the_whole_folder() -> None:
    for name in ("a", "b"):
        with whole_folder(Path("artifacts/x")) as work:
            write_text(work / name, name)
    assert [path.name for path in Path("artifacts/x").iterdir()] == ["b"]


def test_sigkill_leaves_no_result_and_the_next_run_is_clean() -> None:
    program = """if True:
        import os, signal
        from pathlib import Path
        from kd.io.files import whole_folder, write_text
        with whole_folder(Path("artifacts/x")) as work:
            write_text(work / "half", "one")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert not Path("artifacts/x").exists()
    write_whole_file(Path("artifacts/x"), "a file of that name")
    Path("artifacts/x").unlink()
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    with whole_folder(Path("artifacts/x")) as work:
        write_text(work / "a", "two")
    assert [path.name for path in Path("artifacts/x").iterdir()] == ["a"]


def test_whole_file_is_replaced_in_one_move() -> None:
    target = Path("artifacts/logs/x.csv")
    for text in ("one\n", "two\r\n"):
        write_whole_file(target, text)
        assert target.read_bytes() == text.encode()
    assert [path.name for path in target.parent.iterdir()] == ["x.csv"]


@pytest.mark.parametrize(
    ("target", "partial"),
    [
        (Path("artifacts/mini/teacher/base"), Path("artifacts/mini/teacher/.partial/base/work")),
        (Path("table.csv"), Path(".partial/table.csv/work")),
    ],
)
def test_work_lies_on_the_file_system_of_its_target(target: Path, partial: Path, tmp_path: Path) -> None:
    """`artifacts/` may be a volume of its own, and nothing can be renamed across volumes."""
    with whole_file(target) as work:
        write_text(work, "x")
        assert work == partial
    with whole_file(tmp_path / "elsewhere" / target) as work:
        write_text(work, "x")
        assert work == tmp_path / "elsewhere" / partial


def interrupted(target: Path, key: str, name: str) -> Path:
    """A run that stops when it has written one file; its work folder."""
    with suppress(InterruptedError), resumable_folder(target, key) as work:
        write_text(work / name, name)
        raise InterruptedError
    return work


def test_resumable_folder_goes_on_with_its_key_and_clears_other_ones() -> None:
    target, key, other = Path("artifacts/x/base"), "0" * 64, "f" * 64
    interrupted(target, key, "one")
    interrupted(target, key, "two")
    neighbour = interrupted(Path("artifacts/x/base-kd"), key, "one")
    with resumable_folder(target, key):
        pass
    assert sorted(path.name for path in target.iterdir()) == ["one", "two"]
    stale = interrupted(target, key, "three")
    with resumable_folder(target, other) as work:
        assert not list(work.iterdir())
    assert not stale.exists()
    assert neighbour.exists()
