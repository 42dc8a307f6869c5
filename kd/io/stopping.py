"""Work that is stopped or fails in the middle: by Ctrl-C, by a scheduler, by a full disk or a failing GPU."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kd.errors import WorkFailedError
from kd.io.files import full_disk

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# What torch, CUDA and exllamav2 say where the device is at fault and not the program.
DEVICE = re.compile(r"CUDA|out of memory|can't allocate memory|Insufficient VRAM|cuBLAS|CUBLAS|NCCL")
STOPS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 0.05  # from one look whether torch has loaded to the next


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and `kill` send: an end as by Ctrl-C."""


@contextmanager
def signals_stop() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread where SIGINT comes (unless it is ignored), and `Terminated` where
    SIGTERM does, so that what is unfinished is left in order.

    While torch loads, for a second or from a cold disk for many, its native half drops what is raised, or aborts: they
    wait then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        if _torch_loads():
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    with signals_handled(stop, [signal.SIGTERM] if ignored else STOPS):
        yield


@contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Let `handler` have these signals, in the main thread, for as long as the block lasts."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


def _torch_loads() -> bool:
    """As importlib marks a module that is not whole yet."""
    return getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False) is True


@contextmanager
def what_is_kept(folder: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Let whoever stops the work in `folder`, or learns that its disk or the device failed, know what the next run
    starts with."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(kept()) from None
    except OSError as error:
        raise WorkFailedError(f"{system_error(error, folder)}; {kept()}") from error
    except RuntimeError as error:
        if not device_failed(error):
            raise
        raise WorkFailedError(f"{' '.join(str(error).split())}; {kept()}") from error


def device_failed(error: RuntimeError) -> bool:
    """Whether the device is at fault and not the program."""
    return bool(DEVICE.search(str(error)))


def system_error(error: OSError, folder: Path | None = None) -> str:
    """An error of the operating system as one sentence: where (at least in which folder), what, and what to do about a
    full disk or a place that may not be written to."""
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split())
    where = error.filename or folder
    said = f"{where}: {error.strerror}" if where else error.strerror
    if full_disk(error):
        return f"{said}; make room on that disk"
    return f"{said}; let this user write there" if error.errno in FORBIDDEN else said
