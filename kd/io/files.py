"""Files that are either whole or absent: temporary name, fsync, rename.

Unfinished work lies beside its target, in `.partial/<its name>/`: on the same file system, a folder of its own for each
target, and with a lock that only one process has (kd/io/lock.py). It is gone when the work is done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.io.distributed import ALONE, Process
from kd.io.lock import at_work
from kd.io.text import parse_json, read_text, refuse_folder, refuse_half_characters, refuse_no_numbers

PARTIAL = ".partial"
WORK = "work"
MADE = "made"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes `target`'s place when the block ends without an error.

    A `target` from an earlier run stays until the new one is whole. A killed run leaves at most its unfinished folder,
    which the next run clears. `partial` is that folder for whoever knows that nobody else writes `target`.
    """
    with _bench(target, partial) as work, _disk(target):
        _remove(work)
        work.mkdir(parents=True)
        yield work
        put_in_place(work, target)


@contextmanager
def unfinished_folder(target: Path, key: str, process: Process = ALONE) -> Iterator[Path]:
    """Yield the folder in which a run for `target` works, with whatever earlier runs of the same `key` left in it.

    `key`, hexadecimal, stands for everything that shapes the result, so what is found there belongs to it. Fill the
    folder with whole files, then `put_in_place`. All processes of a launch work there at once; WorkFailedError where
    somebody else does.
    """
    bench = bench_of(target)
    with at_work(bench, target, process), _disk(target):
        work = bench / key
        _remove(_replaced(work))
        work.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            with suppress(OSError):  # what is unfinished stays
                work.rmdir()


def remove_stale(work: Path) -> None:
    """Remove the unfinished work for the target of `work` that belongs to another key."""
    for folder in work.parent.iterdir():
        if folder.is_dir() and folder != work:
            _remove(folder)


def put_in_place(work: Path, target: Path) -> None:
    """Move the finished folder `work` to `target`, whose earlier content is replaced whole."""
    _sync_tree(work)
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = _replaced(work)
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _sync(target.parent)
    _remove(replaced)


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[Path]:
    """`whole_folder` for work that goes on where a killed run of the same `key` stopped."""
    with unfinished_folder(target, key) as work:
        remove_stale(work)
        yield work
        put_in_place(work, target)


def in_turn(name: str, made: Mapping[str, Path], key: Callable[[str], str], process: Process = ALONE) -> Generator[str]:
    """The keys of `made`, runs with their targets in one folder, one after another: each is to be made before the next
    is asked for.

    Stopped, it goes on behind what was made, as long as that is there and its `key` is what it was; once all are made,
    nothing is kept of it. `name` is what they are called together, which no target is. Of several processes the first
    keeps what was made.
    """
    if len(made) == 1:
        yield from made
        return
    group = next(iter(made.values())).with_name(name)
    first = process.rank == 0
    with unfinished_folder(group, MADE, process) if first else nullcontext(bench_of(group) / MADE) as work:
        for run, target in made.items():
            mark = work / run
            if mark.exists() and target.exists() and mark.read_text(encoding="utf-8") == key(run):
                continue
            yield run
            if first:
                write_text(mark, key(run))
        if first:
            shutil.rmtree(work)


@contextmanager
def whole_file(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield the path of a file to write; it takes `target`'s place when the block ends without an error.

    `partial` is that path for whoever knows that nobody else writes `target`.
    """
    refuse_folder(target)
    with _bench(target, partial) as work, _disk(target):
        _remove(work)  # of a killed run, which may have made a folder of that name
        try:
            yield work
            put_file_in_place(work, target)
        finally:
            work.unlink(missing_ok=True)


def put_file_in_place(work: Path, target: Path) -> None:
    """Move the finished file `work` to `target`, on the same file system, whose earlier content it replaces."""
    _sync(work)
    target.parent.mkdir(parents=True, exist_ok=True)
    work.replace(target)
    _sync(target.parent)


def bench_of(target: Path) -> Path:
    """Where unfinished work for `target` lies."""
    return target.parent / PARTIAL / target.name


def full_disk(error: BaseException | None) -> bool:
    """Whether an error says that a disk, or one's share of it, is full."""
    return isinstance(error, OSError) and error.errno in FULL


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or will hold it."""
    path = path.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def write_whole_file(target: Path, text: str) -> None:
    """Write UTF-8 text with its own line ends so that `target` holds all of it or what it held before."""
    with whole_file(target) as work:
        write_text(work, text)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with its own line ends, into a folder that `whole_folder` makes whole."""
    path.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, document: Any) -> None:
    """Write JSON, the same bytes for the same document, into a folder that `whole_folder` makes whole."""
    write_text(path, as_json(document))


def as_json(document: Any) -> str:
    """A document as all files of ours hold it; ValueError for numbers that JSON has not, such as NaN."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, what: str, mend: str = "make it again") -> Any:
    """The JSON document in `path`; a UserError that calls it `what`, and says how to `mend` it, where it is missing or
    broken."""
    document = load_json(path, what, mend)
    refuse_no_numbers(document, str(path))
    refuse_half_characters(document, str(path))
    return document


def load_json(path: Path, what: str, mend: str = "make it again") -> Any:
    """The same with what a caller refuses in its own words: numbers that are none, half characters."""
    try:
        return parse_json(read_text(path, f"it should hold {what}"))
    except ValueError as error:
        raise UserError(f"{path}: {what} is not readable ({error}); {mend}") from None


def json_lines(path: Path, mend: str = "name another") -> Iterator[tuple[int, object]]:
    """Line numbers (from 1) and values of a JSON lines file; blank lines are passed over. A UserError where there is no
    such file says how to `mend` that. Text in it may hold half a character."""
    yield from parse_json_lines(read_text(path, mend), path)


def parse_json_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """The same of a text that `path` stands for in messages."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
        if line.strip():
            yield number, _parse_line(path, number, line)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _bench(target: Path, partial: Path | None) -> Iterator[Path]:
    """The path to write at: `partial`, or one that this process alone has."""
    if partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        return
    bench = bench_of(target)
    with at_work(bench, target):
        yield bench / WORK


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    """Name the file that could not be written, where the system's error does not."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _replaced(work: Path) -> Path:
    """Where what `work` takes the place of lies until it has."""
    return work.with_name(work.name + ".replaced")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse_line(path: Path, number: int, line: str) -> object:
    where = f"{path} line {number}"
    try:
        value: object = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); mend the line") from None
    refuse_no_numbers(value, where)
    return value
