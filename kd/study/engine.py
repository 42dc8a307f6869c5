"""`kd study run`: a study's tasks over a Dask cluster, this machine's own or one that somebody else has started.

Every task is a process of its own, so that its GPU's memory goes with it and a crash is its own; a Dask worker starts
it and waits. Results lie in the work folder, whole or absent, so a go that was ended, by its time or by anything else,
goes on with the same command. What a task says is in said/ there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import (
    Client,
    Future,
    KilledWorker,
    Reschedule,
    Scheduler,
    SpecCluster,
    Worker,
    as_completed,
    get_worker,
)
from distributed.core import Status

from kd.errors import UserError
from kd.io.distributed import gpu_names
from kd.io.progress import progress
from kd.machine.probe import read_gpus
from kd.study.plan import Plan, Task
from kd.study.work import PARENT, missing

SAID = Path("said")
SLOTS = 6  # tasks at a time on a GPU: an assessment takes 4 GiB
HEAVY = 2  # of them such as train a cohort, of which one of 15 takes 16 GiB
RESOURCE = "heavy"
POLL_S = 0.1
GRACE_S = 20.0  # for a task that is told to end
CONNECT_S = 30
WORKING = (Status.running, Status.paused, Status.closing_gracefully)
# Of Dask: no profile of threads that only wait, and no worker given up because a machine is busy.
SETTINGS = {"distributed.worker.profile.enabled": False, "distributed.scheduler.worker-ttl": None}


class TaskFailedError(Exception):
    """A task's process ended with an error."""

    def __init__(self, task: str, words: str) -> None:
        super().__init__(task, words)
        self.task, self.words = task, words


def run(plan: Plan, scheduler: str | None, jobs: int | None, minutes: float | None) -> int:
    """Run what is missing on the cluster at `scheduler` (None: this machine's own, `jobs` tasks at a time) until all is
    done or the minutes are over; returns the exit status."""
    tasks = {task.name: task for task in missing(plan)}
    total, over = len(plan.tasks), set(plan.tasks) - set(tasks)
    with progress((), "study", "task", total) as bar:
        bar.update(len(over))
        if tasks:
            with dask.config.set(SETTINGS), _cluster(scheduler, jobs) as (client, gpus):
                for name, problem in _ended(client, gpus, plan, tasks, minutes):
                    bar.update()
                    if problem:
                        bar.write(problem, file=sys.stderr)
                    else:
                        over.add(name)
    if len(over) < total:
        print(f"kd: {len(over)} of {total} tasks are done; the same command goes on", file=sys.stderr)
    return int(len(over) < total)


@contextmanager
def _cluster(scheduler: str | None, jobs: int | None) -> Iterator[tuple[Client, dict[str, str]]]:
    """A client of the cluster, and the GPU of each worker where that is ours to say."""
    if scheduler:
        with _connected(scheduler) as client:
            yield client, {}
        return
    names = gpu_names(len(read_gpus()))
    slots = jobs or SLOTS * len(names) or 1
    gpus = {f"slot {slot}": names[slot % len(names)] for slot in range(slots) if names}
    heavy = HEAVY * max(1, len(names))
    # Tasks are processes anyway, so workers are threads of this one: they listen to nobody else, and end with it.
    local = {"protocol": "inproc", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    workers = {
        f"slot {slot}": {
            "cls": Worker,
            "options": {**local, "nthreads": 1, "memory_limit": 0, "resources": {RESOURCE: 1} if slot < heavy else {}},
        }
        for slot in range(slots)
    }
    with (
        SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": local}, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        yield client, gpus


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    try:
        client = Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scheduler: {scheduler}: no Dask scheduler answers there ({error}); start one, or name it"
        ) from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not any(worker["resources"].get(RESOURCE) for worker in workers):
            raise UserError(
                f"--scheduler: {scheduler}: no worker there takes what is heavy for a GPU; start at least one a GPU by "
                f"`dask worker {scheduler} --nthreads 1 --resources {RESOURCE}=1`"
            )
        yield client


def _ended(
    client: Client, gpus: dict[str, str], plan: Plan, tasks: Mapping[str, Task], minutes: float | None
) -> Iterator[tuple[str, str]]:
    """The tasks as they end, with what is to be said of one that failed or could not begin; those that run when the
    time is over, or when this is left in another way, are ended."""
    futures: dict[str, Future[None]] = {}
    for place, (name, task) in enumerate(tasks.items()):
        futures[name] = client.submit(
            _process,
            [str(plan.path.parent), name, "--work", str(Path.cwd())],
            gpus,
            [futures[need] for need in task.needs if need in futures],
            key=(task.kind, name),
            resources={RESOURCE: 1} if task.heavy else None,
            priority=-place,
        )
    try:
        for future in as_completed(futures.values(), timeout=minutes and 60 * minutes):
            name = future.key[1]
            yield name, _problem(name, future)
    except TimeoutError:
        return
    finally:
        client.cancel(list(futures.values()))


def _problem(name: str, future: Future[None]) -> str:
    """What is to be said of a task that ended, nothing of one that is done."""
    if future.status == "cancelled":
        return f"{name} failed: the cluster has dropped it"
    match error := future.exception() if future.status == "error" else None:
        case None:
            return ""
        case TaskFailedError():
            of, words = error.task, error.words
        case KilledWorker():
            of, words = str(error.args[0][1]), f"{error.allowed_failures + 1} workers ended while they were at it"
        case _:
            raise error
    return f"{name} failed: {words}" if of == name else f"{name} is left out, since {of} failed"


def _process(arguments: list[str], gpus: Mapping[str, str], needs: list[None]) -> None:
    """Run a task in a process of its own, on this worker's GPU, its output kept in said/; end it where the task is
    cancelled or the worker closes."""
    del needs
    worker, key = get_worker(), get_worker().get_current_task()
    name, work = arguments[1], Path(arguments[3])
    said = work / SAID / f"{name}.log"
    said.parent.mkdir(parents=True, exist_ok=True)
    variables = {PARENT: str(os.getpid())}
    if worker.name in gpus:
        variables["CUDA_VISIBLE_DEVICES"] = gpus[worker.name]
    command = [sys.executable, "-m", "kd", "study", "task", *arguments]
    with said.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            start_new_session=True,  # Ctrl-C at the terminal is for us, who end it
        )
    while process.poll() is None:
        if worker.state.tasks[key].state == "cancelled" or worker.status not in WORKING:
            _end(process)
            raise Reschedule  # for another worker, if anybody still wants it
        time.sleep(POLL_S)
    if process.returncode:
        raise TaskFailedError(name, _last_words(said))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
