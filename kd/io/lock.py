"""Who is at work on a result: one process, or the processes of one launch, and nobody else beside them.

The system's own locks (flock): one that was killed holds nothing, one that outlived its parent still does. A lock is a
file in the folder of the unfinished work, where its holder says who it is; it goes when its holder is done.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from kd.errors import UserError, WorkFailedError
from kd.io.distributed import ALONE, Process

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems


@contextmanager
def at_work(folder: Path, target: Path, process: Process = ALONE) -> Iterator[None]:
    """Be the one at work on `target`, in `folder`, which is made for it and removed if nothing is left in it.

    WorkFailedError where another process is, who it is and since when; the other processes of a launch are not others.
    """
    own = folder / f"{process.rank}-of-{process.world}.lock"
    descriptor = _take(own)
    if descriptor is None:
        raise WorkFailedError(_busy(target, own))
    try:
        for path in sorted(folder.glob("*.lock")):
            if not path.name.endswith(f"-of-{process.world}.lock"):  # of another launch, at work or killed
                found = _take(path)
                if found is None:
                    raise WorkFailedError(_busy(target, path))
                _leave(path, found)
        with suppress(OSError):  # a full disk: who is at work is then not said
            os.write(descriptor, json.dumps(_holder()).encode())
        yield
    finally:
        _leave(own, descriptor)
        with suppress(OSError):  # what is unfinished stays
            folder.rmdir()
            folder.parent.rmdir()


def _take(path: Path) -> int | None:
    """Lock a file, made if need be: its descriptor, or None where another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever was here has just removed the folder
            continue
        except (FileExistsError, NotADirectoryError):
            for file in path.parents:
                if file.is_file() or (file.is_symlink() and not file.exists()):
                    what = "a link to nothing" if file.is_symlink() else "a file"
                    raise UserError(f"{file}: {what} is where a folder should be; move it away") from None
            continue  # a folder that was there a moment ago
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(f"kd: {path.parent}: no locks on this file system; start nothing twice", file=sys.stderr)
        if _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            return descriptor
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file that is open is the one that lies there; its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _leave(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _holder() -> dict[str, str | int]:
    return {
        "command": shlex.join(["kd", *sys.argv[1:]]),
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _busy(target: Path, lock: Path) -> str:
    """Who is at work on `target`, as its lock says."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        process, since = f"process {holder['pid']} on {holder['host']}", holder["since"]
        who = f"{process} ({holder['command']}) is at work on it since {since}"
    except (OSError, ValueError, LookupError, TypeError):  # it has just begun, or just ended
        who = "another process is at work on it"
    return f"{target}: {who}; wait until it ends, or stop it, then run the same command again: nothing is lost"
