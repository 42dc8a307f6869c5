"""`kd` as processes that begin at once: forked from a server that has imported the libraries.

What is killed, or runs beside itself, is a process of its own as ever; a test process could not fork it, for torch has
threads there. What others start, DVC or a study's workers, they start by `quick_python`. Not for a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from kd.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    "dvc.repo dvclive kd.assess.run kd.cli kd.config kd.distill.train kd.teacher.capture matplotlib.pyplot peft pytest "
    "optuna.visualization.matplotlib preloaded torch._dynamo transformers.models.llama.modeling_llama".split()
)
SAID = Path("said")
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def begin(*arguments: str, said: Path = SAID, first: Callable[[], object] = tuple, **variables: str) -> BaseProcess:
    """`kd`, begun, with more variables in its environment; what it says is added to a file. It calls `first`, a
    function of a module, before anything else."""
    process = SERVER.Process(target=_kd, args=(arguments, {**os.environ, **variables}, said, first))
    _have_server()
    process.start()
    return process


def status(process: BaseProcess, seconds: float = 120) -> int:
    """A process's exit status, once it has ended; minus the signal's number where one has ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def whole_seconds(*arguments: str, first: Callable[[], object] = tuple) -> float:
    """How long `kd` takes to its end, which must be a good one, where the server has its libraries."""
    nothing = SERVER.Process()  # which the server begins once it has imported them
    _have_server()
    nothing.start()
    nothing.join()
    began = time.monotonic()
    assert status(begin(*arguments, first=first)) == 0, SAID.read_text()
    return time.monotonic() - began


def _have_server() -> None:
    """Have the server run; it finds the tests' modules, for of `sys.path` it is told nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ensure_running()


def _kd(arguments: Sequence[str], variables: Mapping[str, str], said: Path, first: Callable[[], object]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.dup2(2, 1)
    first()
    sys.exit(main(arguments))


# A Python whose `-m kd` and `-m dvc` a server forks; signals go there, once it has the request; its status comes from
# there. All else is Python's own.
QUICK = """#!{python} -IS
import json, os, signal, socket, sys

real = {python!r}
if sys.argv[1:2] != ["-m"] or sys.argv[2] not in ("kd", "kd.cli", "kd.machine.parts", "dvc"):
    os.execv(real, [real, *sys.argv[1:]])
forwarded = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
for number in forwarded:
    signal.signal(number, lambda number, _: server.send(bytes([number])))
socket.send_fds(server, [json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n"], [0, 1, 2])
server.recv(1)
signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
os._exit(server.recv(1)[0])
"""


def quick_python(folder: Path) -> Path:
    """A program in the place of Python, in `folder`: `python -m kd` and `python -m dvc` begin at once, and so does what
    they begin by `sys.executable`. Where it is killed, so is what it began."""
    program = folder / "python"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "server"))
    listening.listen()
    program.write_text(QUICK.format(python=sys.executable, path=str(folder / "server")))
    program.chmod(0o755)
    _have_server()
    SERVER.Process(target=_serve, args=(listening,), daemon=True).start()
    return program


def _serve(listening: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            _answer(client)
        client.close()


def _answer(client: socket.socket) -> None:
    """Do as one client asks, in a process of its own."""
    said, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not said.endswith(b"\n"):
        if not (more := client.recv(1 << 20)):
            os._exit(1)  # it was killed
        said += more
    client.send(b"!")
    (program, _, module, *arguments), folder, variables = json.loads(said)
    ended, held = os.pipe()  # which ends with the process that holds it
    # What a signal raises while a fork's hooks run, Python ignores: it waits until the work begins.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    work = os.fork()
    if work == 0:
        os.setpgid(0, 0)
        client.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.executable, sys.argv, sys.path[0] = program, [module, *arguments], folder
        sys.orig_argv = [program, "-m", *sys.argv]
        if Path("kd").is_dir():  # a checkout has its own
            for name in [name for name in sys.modules if name.partition(".")[0] == "kd"]:
                del sys.modules[name]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        for first in variables.get("PYTHONPATH", "").split(os.pathsep):
            if (customize := Path(first, "sitecustomize.py")).is_file():
                runpy.run_path(str(customize))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    os.setpgid(work, work)
    os.close(held)
    while ended not in select.select([client, ended], [], [])[0]:
        number = client.recv(1)
        os.killpg(work, number[0] if number else signal.SIGKILL)
        if not number:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(work, 0)[1])
    with suppress(BrokenPipeError):
        client.send(bytes([status if status >= 0 else 128 - status]))
    os._exit(0)
