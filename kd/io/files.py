"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.errors import UserError

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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it should hold {what}") from None
    except ValueError as error:
        raise UserError(f"{path}: {what} is not readable ({error}); make it again") from None


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Line numbers (from 1) and values of a JSON lines file; blank lines are passed over."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(path, number, line)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a UTF-8 CSV file, which must have `columns`; a UserError names the file and the row at fault."""
    csv.field_size_limit(sys.maxsize)  # a response may be longer than the default 128 KiB
    rows: list[dict[str, str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark first
            reader = csv.DictReader(file, strict=True)
            for column in columns:
                if column not in (reader.fieldnames or []):
                    found = ", ".join(reader.fieldnames or []) or "nothing"
                    raise UserError(f"{path}: no column {column!r}; its first line names {found}")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise UserError(f"{path} row {number}: not as many cells as the first line names; mend the row")
                rows.append(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}), somewhere behind row {len(rows)}") from None
    except csv.Error as error:
        raise UserError(f"{path} row {len(rows) + 1}: not readable as CSV ({error}); mend the row") from None
    return rows


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(target: Path) -> Path:
    top = target.parent if target.is_absolute() or len(target.parts) == 1 else Path(target.parts[0])
    return top / PARTIAL / "-".join(target.parts[-3:])


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
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
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: not JSON ({error}); mend or remove the line") from None
