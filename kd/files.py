"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.errors import UserError

PARTIAL = Path(".partial")


@contextmanager
def whole_folder(target: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes `target`'s place when the block ends without an error.

    A killed or failed run leaves at most its unfinished folder under `partial` (default: `.partial/` beside
    the pipeline), which the next run clears. A `target` from an earlier run stays until the new one is whole.
    """
    work = partial or _partial(target)
    _remove(work)
    work.mkdir(parents=True)
    yield work
    _sync_tree(work)
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = work.with_name(work.name + ".replaced")
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    work.rename(target)
    _sync(target.parent)
    _remove(replaced)


def write_whole_file(target: Path, text: str) -> None:
    """Write UTF-8 text with its own line ends so that `target` holds all of it or what it held before."""
    work = _partial(target)
    work.parent.mkdir(parents=True, exist_ok=True)
    write_text(work, text)
    _sync(work)
    target.parent.mkdir(parents=True, exist_ok=True)
    work.replace(target)
    _sync(target.parent)


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


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(target: Path) -> Path:
    return PARTIAL / "-".join(target.parts[-3:])


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
