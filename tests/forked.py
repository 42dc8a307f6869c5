"""`kd` as processes that begin at once: forked from a server that has imported the libraries.

What is killed, or runs beside itself, is a process of its own as ever; a test process could not fork it, for torch has
threads there. Not for a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from kd.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    "dvc.repo dvclive kd.assess.run kd.cli kd.config kd.distill.train kd.teacher.capture matplotlib.pyplot peft pytest "
    "optuna.visualization.matplotlib preloaded torch._dynamo transformers.models.llama.modeling_llama".split()
)
SAID = Path("said")


def begin(*arguments: str, said: Path = SAID, first: Callable[[], object] = tuple, **variables: str) -> BaseProcess:
    """`kd`, begun, with more variables in its environment; what it says is added to a file. It calls `first`, a
    function of a module, before anything else."""
    process = SERVER.Process(target=_kd, args=(arguments, {**os.environ, **variables}, said, first))
    _serve()
    process.start()
    return process


def status(process: BaseProcess, seconds: float = 120) -> int:
    """A process's exit status, once it has ended; minus the signal's number where one has ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def whole_seconds(*arguments: str, first: Callable[[], object] = tuple) -> float:
    """How long `kd` takes to its end, which must be a good one, where the server has its libraries."""
    _serve()
    nothing = SERVER.Process()  # which the server begins once it has imported them
    nothing.start()
    nothing.join()
    began = time.monotonic()
    assert status(begin(*arguments, first=first)) == 0, SAID.read_text()
    return time.monotonic() - began


def _serve() -> None:
    """Start the server, unless there is one, in this folder: of what it imports, some lies here."""
    with contextlib.chdir(Path(__file__).parent):
        forkserver.ensure_running()


def _kd(arguments: Sequence[str], variables: Mapping[str, str], said: Path, first: Callable[[], object]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.dup2(2, 1)
    first()
    sys.exit(main(arguments))
