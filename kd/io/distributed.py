"""One job over several processes: which part each does, on which GPUs, and how the first waits for the others.

torchrun (or anything else that sets RANK and WORLD_SIZE) and SLURM's srun are understood. The processes share nothing
but a file system: each writes whole files of its own part, and the first one puts them together.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kd.errors import UserError, WorkFailedError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
SLURM_JOB, SLURM_STEP = "SLURM_JOB_ID", "SLURM_STEP_ID"  # a job's script has the former alone, srun's processes both
LAUNCHED = "KD_LAUNCHED"  # set for the processes that `launch` started, which do the work
POLL_S = 0.5
STALL_S = 30 * 60.0  # longer than a process takes to load a 405B teacher and finish its first shard


@dataclass(frozen=True)
class Process:
    """One of `world` processes, `rank` counted from 0; `local` of `local_world` on this machine."""

    rank: int
    world: int
    local: int
    local_world: int

    def part(self, count: int) -> range:
        """Which of `count` items this process does: one contiguous part; all parts together are every item once."""
        return _part(count, self.rank, self.world)


ALONE = Process(0, 1, 0, 1)


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """This process's place as its launcher gives it in the environment; the only one where none does.

    A launcher that says nothing of machines is taken to have started all processes on one. SLURM describes a job's
    script, which is one process, as the first of its tasks; only srun starts the others.
    """
    in_script = SLURM_JOB in environment and SLURM_STEP not in environment
    by_slurm = not environment.keys() & {"RANK", "WORLD_SIZE"} and SLURM[0] in environment and not in_script
    names = SLURM if by_slurm else TORCHRUN
    for name, other in (TORCHRUN[:2], TORCHRUN[1::-1]):
        if name in environment and other not in environment:
            raise UserError(
                f"{name} is set and {other} is not; a launcher sets both, and a single process needs neither"
            )
    rank, world = _number(environment, names[0], 0), _number(environment, names[1], 1)
    if rank >= world:
        raise UserError(f"{names[0]} is {rank} where {names[1]} is {world}; ranks count from 0 to {world - 1}")
    return Process(rank, world, _number(environment, names[2], rank), _number(environment, names[3], world))


def launch(launcher: str) -> None:
    """Become `launcher` with this very command behind it, unless there is none or it has started this process.

    The launcher says where the work is done and nothing about its result, so it is not part of DVC's stage commands:
    another one makes no stage out of date.
    """
    if not launcher or LAUNCHED in os.environ or "RANK" in os.environ:
        return
    command = [*shlex.split(launcher), sys.executable, "-m", "kd", *sys.argv[1:]]
    print(f"kd: {shlex.join(command)}", file=sys.stderr, flush=True)
    try:
        os.execvpe(command[0], command, os.environ | {LAUNCHED: "1"})
    except OSError as error:
        raise UserError(
            f"launcher: {command[0]!r} does not start ({error.strerror}); mend or empty `launcher` in the params file"
        ) from None


def take_gpus(process: Process) -> None:
    """Leave this process only its share of the machine's GPUs. Call before anything is put on one; then it has it."""
    import torch

    count = torch.cuda.device_count()
    if process.local_world == 1 or count <= 1 or torch.cuda.is_initialized():  # nothing to share out, or it is shared
        return
    share = _part(count, process.local, process.local_world) or [process.local % count]
    names = gpu_names(count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in share)


def gpu_names(count: int) -> list[str]:
    """The `count` GPUs that are visible, as CUDA_VISIBLE_DEVICES calls them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def wait_for_others(left: Callable[[], int], what: str, unit: str = "shard") -> None:
    """Return once `left()`, the number of `unit`s that other processes still owe, is 0.

    WorkFailedError where none has come for half an hour.
    """
    from kd.io.progress import progress

    owed, since = left(), time.monotonic()
    if not owed:
        return
    with progress((), what, unit, total=owed) as bar:
        while owed:
            time.sleep(POLL_S)
            still = left()
            if still < owed:
                bar.update(owed - still)
                owed, since = still, time.monotonic()
            elif time.monotonic() - since > STALL_S:
                raise WorkFailedError(
                    f"{what}: {owed} of their {unit}s are missing and none came for {STALL_S / 60:.0f} minutes; see "
                    "how those processes ended (all need the same params, data, libraries and kind of GPU)"
                )


def _part(count: int, rank: int, world: int) -> range:
    return range(count * rank // world, count * (rank + 1) // world)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; the launcher should set a number")
    return int(text)
