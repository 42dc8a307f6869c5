"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.io.text import parse_json, read_text, refuse_half_characters, refuse_no_numbers

PARTIAL = ".partial"  # holds unfinished work, in the folder at the top of the target's path: on its file system


@contextmanager
def whole_folder(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes `target`'s place when the block ends without an error.

    A killed or failed run leaves at most its unfinished folder under `partial` (default: in
    `artifacts/.partial/`), which the next run clears. A `target` from an earlier run stays until the new one is whole.
    """
    work = partial or _partial(target)
    _remove(work)
    work.mkdir(parents=True)
    yield work
    put_in_place(work, target)


def unfinished_folder(target: Path, key: str) -> Path:
    """The folder in which a run for `target` works, with whatever earlier runs of the same `key` left in it.

    `key`, hexadecimal, stands for everything that shapes the result, so what is found there belongs to it. Fill the
    folder with whole files, then `put_in_place`.
    """
    work = _partial(target).with_name(f"{_partial(target).name}-{key}")
    work.mkdir(parents=True, exist_ok=True)
    return work


def remove_stale(target: Path, key: str) -> None:
    """Remove the unfinished folders of `target` that belong to another key than `key`."""
    name = _partial(target).name
    for folder in _partial(target).parent.glob(f"{name}-*"):
        found = re.fullmatch(rf"{re.escape(name)}-([0-9a-f]+)(\.replaced)?", folder.name)
        if found and found[1] != key:
            _remove(folder)


def put_in_place(work: Path, target: Path) -> None:
    """Move the finished folder `work` to `target`, whose earlier content is replaced whole."""
    _sync_tree(work)
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = work.with_name(work.name + ".replaced")
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _sync(target.parent)
    _remove(replaced)


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[Path]:
    """`whole_folder` for work that goes on where a killed run of the same `key` stopped."""
    remove_stale(target, key)
    work = unfinished_folder(target, key)
    yield work
    put_in_place(work, target)


@contextmanager
def whole_file(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield the path of a file to write; it takes `target`'s place when the block ends without an error.

    It is written at `partial` (default: in `artifacts/.partial/`), on the file system of `target`.
    """
    work = partial or _partial(target)
    work.parent.mkdir(parents=True, exist_ok=True)
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
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON document in `path`; a UserError that calls it `what` where it is missing or broken."""
    document = load_json(path, what)
    refuse_no_numbers(document, str(path))
    refuse_half_characters(document, str(path))
    return document


def load_json(path: Path, what: str) -> Any:
    """The same with what a caller refuses in its own words: numbers that are none, half characters."""
    try:
        return parse_json(read_text(path, f"it should hold {what}"))
    except ValueError as error:
        raise UserError(f"{path}: {what} is not readable ({error}); make it again") from None


def json_lines(path: Path, mend: str = "name another") -> Iterator[tuple[int, object]]:
    """Line numbers (from 1) and values of a JSON lines file; blank lines are passed over. A UserError where there is no
    such file says how to `mend` that. Text in it may hold half a character."""
    for number, line in enumerate(read_text(path, mend).split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
        if line.strip():
            yield number, _parse_line(path, number, line)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(target: Path) -> Path:
    top = target.parent if target.is_absolute() or len(target.parts) == 1 else Path(target.parts[0])
    return top / PARTIAL / "-".join(target.parts[-3:])


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


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
