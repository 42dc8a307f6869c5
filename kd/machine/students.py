"""`kd students`: what comes behind the teachers, side by side, one student a GPU; on a CPU the teachers as well.

Every stage is DVC's own: `dvc repro --single-item STAGE`, in a process that sees one GPU. DVC does not hold its lock
while a stage's command runs, only while it looks what is out of date and writes dvc.lock; the others wait for it then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kd.config import Config
from kd.errors import UserError, WorkFailedError
from kd.io.distributed import LAUNCHED, gpu_names
from kd.io.stopping import STOPS, signals_handled
from kd.machine.probe import GIB, read_memory
from kd.models.load import model_folder
from kd.models.weights import WEIGHTS

# Stages that take one GPU.
GROUPS = ("train", "train-control", "assess", "assess-control", "assess-untrained", "statistics")
ON_A_CPU = ("teacher", *GROUPS)  # where no teacher is shared out over GPUs
PYTHON = GIB // 2  # what a stage takes beside its weights
EDGE = re.compile(r'^"?([^"]+?)"? -> "?([^"]+?)"?;$', re.MULTILINE)
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
FAILED = "ERROR: failed to reproduce"
KEPT = "what is done is kept, and the same command goes on from there"

_terminal = threading.Lock()


@dataclass(frozen=True)
class Place:
    """Where one stage runs at a time: on one GPU, called as CUDA_VISIBLE_DEVICES calls it, or None where there is none;
    and by as many `threads` as it has cores for itself.

    Threads of several processes that want all cores wait for each other: on two cores the teacher's rows of a 405B's
    width came together in 0.6 ms, beside another such process in 6.5 (docs/scale.md).
    """

    gpu: str | None
    threads: int

    def environment(self) -> dict[str, str]:
        """Variables of a stage here. `launcher` in the params, which would share a stage out over GPUs, is left out."""
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}
        return {LAUNCHED: "1", "OMP_NUM_THREADS": str(self.threads)} | gpu


def places_for(gpus: Sequence[str | None]) -> list[Place]:
    """A place on each of the `gpus` (None: on none), with its share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(gpus))
    return [Place(gpu, threads) for gpu in gpus]


def room_for(weights: int, memory: int) -> int:
    """How many students of so many bytes of weights load at once through so many of host memory: their tensors, and
    the files' pages that they are read from."""
    return max(1, memory // (2 * weights + PYTHON))


@dataclass(frozen=True)
class Running:
    """A stage that runs."""

    stage: str
    place: Place
    process: subprocess.Popen[str]


def run(config: Config, jobs: int | None) -> None:
    """Bring every student and its assessment up to date, and before them what they need: teachers, by all GPUs.

    `jobs` at a time (None: as many as there are GPUs, or cores, and memory to load students). WorkFailedError names
    what failed, once all else is done.
    """
    with ThreadPoolExecutor(1) as pool:  # a second or two for each of two processes
        counted = pool.submit(_count_gpus)
        graph = _asked("dag", "--dot")
        names = gpu_names(counted.result())
    needs = _read_needs(graph, GROUPS if names else ON_A_CPU)
    if jobs and names and jobs > len(names):
        raise UserError(f"--jobs {jobs}: every student has a GPU and {len(names)} are visible; give at most that many")
    try:
        _bring_up_to_date(sorted(set().union(*needs.values()) - needs.keys()))
        needs = _outdated(needs)
        failed, left = _side_by_side(needs, _places(config, names, jobs, len(needs)))
    except KeyboardInterrupt as stop:
        raise type(stop)(KEPT) from None
    for stage, last_words in failed.items():
        print(f"{stage} failed: {last_words}", file=sys.stderr)
    if failed:
        behind = f", and {', '.join(left)} could not begin without" if left else ""
        raise WorkFailedError(f"{', '.join(failed)} failed{behind}; mend what is said above, then: {KEPT}")


def _count_gpus() -> int:
    """How many GPUs torch sees; by a process of its own, for torch would stay in this one's memory all along."""
    counted = "from kd.machine.probe import read_gpus; print(len(read_gpus()))"
    return int(subprocess.run([sys.executable, "-c", counted], check=True, capture_output=True, text=True).stdout)


def _read_needs(graph: str, groups: Collection[str]) -> dict[str, set[str]]:
    """The stages of `groups` in DVC's graph, those that others wait for first, and of each the stages whose results it
    reads."""
    edges = [edge for edge in EDGE.findall(graph) if edge[1].partition("@")[0] in groups]
    waited_for = {before for before, _ in edges}
    stages = sorted({stage for _, stage in edges}, key=lambda stage: (stage not in waited_for, stage))
    return {stage: {before for before, after in edges if after == stage} for stage in stages}


def _outdated(needs: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Those of the stages that DVC would run: what is changed for them, or will be once those they need have run."""
    changed = needs.keys() & json.loads(_asked("status", "--json"))  # of all: naming stages takes it longer
    for stage, before in needs.items():
        if before & changed:
            changed.add(stage)
    return {stage: needs[stage] for stage in needs if stage in changed}


def _asked(*command: str) -> str:
    """What DVC answers."""
    found = subprocess.run([*DVC, *command], capture_output=True, text=True)
    if found.returncode:
        last_words = found.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"DVC's {command[0]} fails here ({last_words[0]}); go to the checkout, or mend that")
    return found.stdout


def _places(config: Config, gpus: list[str], jobs: int | None, stages: int) -> list[Place]:
    """As many places as GPUs, on a CPU as there are cores and `stages` for them, or fewer where host memory, through
    which each student is loaded, would not take them; `jobs` where that is given."""
    weights = sum(path.stat().st_size for path in model_folder(config.student.model).glob(WEIGHTS))
    memory, cores = read_memory(), len(os.sched_getaffinity(0))
    room = room_for(weights, memory)
    if not jobs and room < len(gpus):
        print(
            f"kd: {memory / GIB:.0f} GiB of host memory load {room} students at once, {weights / GIB:.1f} GiB of "
            f"weights each, so {len(gpus) - room} of {len(gpus)} GPUs stay idle; --jobs says otherwise",
            file=sys.stderr,
        )
    count = jobs or min(room, len(gpus) or max(1, min(cores, stages)))
    return places_for(gpus[:count] if gpus else [None] * count)


def _bring_up_to_date(stages: list[str]) -> None:
    """Run whatever of `stages`, and before them, is out of date, as `dvc repro` does, with all GPUs."""
    process = _start(["repro", *stages], {})
    with _ended_with_us(lambda: [process]):
        status = process.wait()
    if status:
        raise WorkFailedError(f"what the students need failed, as said above; mend it, then: {KEPT}")


def _side_by_side(needs: Mapping[str, set[str]], places: list[Place]) -> tuple[dict[str, str], list[str]]:
    """Run the stages, each as soon as those it needs are done and a place is free; returns the failed ones with their
    last words, and those that could not begin."""
    waiting, free = list(needs), list(places)
    done: set[str] = set()
    failed: dict[str, str] = {}
    running: dict[Future[str], Running] = {}
    width = max(map(len, needs), default=0)
    with ThreadPoolExecutor(len(places)) as pool, _ended_with_us(lambda: [one.process for one in running.values()]):
        while True:
            ready = [stage for stage in waiting if done.issuperset(needs[stage] & needs.keys())]
            for stage in ready[: len(free)]:
                waiting.remove(stage)
                place = free.pop(0)
                process = _start(["repro", "--single-item", stage], place.environment(), subprocess.PIPE)
                running[pool.submit(_tell, f"{stage:<{width}} | ", process)] = Running(stage, place, process)
            if not running:
                return failed, waiting
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one = running.pop(future)
                free.append(one.place)
                if one.process.wait():
                    failed[one.stage] = future.result()
                else:
                    done.add(one.stage)


def _start(command: list[str], variables: dict[str, str], output: int | None = None) -> subprocess.Popen[str]:
    """DVC with a command, in a session of its own: Ctrl-C at the terminal reaches it through us, once."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # the stages' `python`
    return subprocess.Popen(
        [*DVC, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"} | variables,
        start_new_session=True,
    )


def _tell(prefix: str, process: subprocess.Popen[str]) -> str:
    """Show each line of a process behind `prefix` until it has ended, a redrawn bar as lines; returns its last words,
    but for DVC's that the command failed."""
    last_words = "it said nothing"
    assert process.stdout
    for line in process.stdout:
        if text := line.strip():
            last_words = last_words if text.startswith(FAILED) else text
            with _terminal:
                print(f"{prefix}{line.rstrip()}", file=sys.stderr, flush=True)
    process.wait()
    return last_words


@contextmanager
def _ended_with_us(running: Callable[[], list[subprocess.Popen[str]]]) -> Iterator[None]:
    """Whatever ends the block, nothing is left running: each is stopped as by Ctrl-C, and keeps what it has. Ctrl-C
    again is for them, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # behind `&` in a script; what we start would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        left = [process for process in running() if process.poll() is None]

        def interrupt(*_: object) -> None:
            for process in left:
                _interrupt(process)

        with signals_handled(interrupt, STOPS):  # Ctrl-C again raises nothing: nobody would be told what is left
            interrupt()
            for process in left:
                process.wait()
                _interrupt(process)  # a command that DVC was just starting was not told, and DVC does not wait for it


def _interrupt(process: subprocess.Popen[str]) -> None:
    """Tell all processes of the session that `process` began, as Ctrl-C tells those at a terminal."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
