"""`kd rehearse`: the experiment in params on this machine before it is run, on random weights of its models' shapes.

Each stage's own code does a part of the stage's work, in a process of its own (kd/machine/parts.py); from what that
took, and from the lengths of all rows, the whole stage is reckoned. Nothing is said of results.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

from kd.config import Config, HubModel, Model, run_name
from kd.errors import WorkFailedError
from kd.io.distributed import gpu_names
from kd.machine.disks import COPIES, MODELS, RESULTS, Owed, shortage
from kd.machine.lengths import ALL, batch_tokens, row_lengths, spread, token_counter, words, write_rows
from kd.machine.probe import GIB, copies_folder, find_model, gpus_needed, read_disk, read_memory
from kd.machine.random_exl2 import tensors
from kd.machine.shapes import settings_of
from kd.machine.stand_in import write_stand_in
from kd.machine.students import Place, places_for, room_for
from kd.models import hub

ROWS_CPU, ROWS_GPU = 16, 64  # training rows of a rehearsal
TEST_ROWS = 32
OUTLIER = 2.5
POLL_S = 0.02
SPEED_BYTES = 2**28  # read from the disk to learn its speed, and hashed
COMMAND_S = 1.5  # of DVC around each of its stages
REPORT_S = 2.0  # of `kd report` beside its start
STEP_SHARE = 1 / 3  # of a training step, in which a question of `kd attention` is read
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KILLED = "killed by the system, mostly for lack of the host's memory; take a machine, or a container, with more"
RANDOM = "Random weights say nothing of results: this is what the experiment takes, not what comes of it."


@dataclass
class Stage:
    """What a stage takes: so many processes, `each` by name where they differ, `one_s` on average; `seconds` until all
    are done, side by side where they can be. None where it could not be told."""

    stage: str
    processes: int
    one_s: float | None = None
    seconds: float | None = None
    each: dict[str, float] = field(default_factory=dict)
    gpu_gib: list[float] = field(default_factory=list)
    memory_gib: float | None = None
    disk_gib: float = 0.0
    fits: bool = True
    why: str | None = None
    note: str = ""

    def take(self, each: dict[str, float], places: int, once: float = 0.0) -> None:
        """Its processes take so many seconds each, so many of them at a time, and some `once`."""
        self.each, self.one_s = each, statistics.fmean(each.values())
        self.seconds = side_by_side(each.values(), places) + once

    def refuse(self, why: str) -> None:
        """It cannot be done on this machine."""
        self.fits, self.why = False, why


@dataclass(frozen=True)
class Machine:
    """What there is: GPUs' names and GiB, and the host's memory."""

    gpus: list[dict[str, Any]]
    memory_gib: float
    start_s: float = 0.0  # of a command that does nothing


def rehearse(params: Config, price: float | None = None) -> dict[str, Any]:
    """What the experiment takes on this machine; `price` is an hour's. The document of `--json`."""
    began = time.perf_counter()
    with scratch(params) as folder:
        machine = look_around(params, folder)
        stages, disk, notes = Rehearsal(params, folder, machine).stages()
    known = [stage.seconds for stage in stages]
    seconds = None if None in known else sum(s for s in known if s is not None)
    return {
        "profile": params.profile,
        "random_weights": RANDOM,
        "machine": asdict(machine),
        "stages": [asdict(stage) for stage in stages],
        "disk": disk,
        "seconds": seconds,
        "price_per_hour": price,
        "price": None if price is None or seconds is None else round(price * seconds / 3600, 2),
        "fits": all(stage.fits for stage in stages) and disk["fits"],
        "notes": notes,
        "rehearsed_s": round(time.perf_counter() - began, 1),
    }


def insist(document: dict[str, Any]) -> None:
    """Refuse where something does not fit."""
    wrong = [f"{stage['stage']}: {stage['why']}" for stage in document["stages"] if not stage["fits"]]
    wrong += [] if document["disk"]["fits"] else [document["disk"]["why"]]
    if wrong:
        raise WorkFailedError(f"{document['profile']} does not fit this machine: {'; '.join(wrong)}")


def text(document: dict[str, Any]) -> str:
    """The document for a terminal."""
    there = [gpu["gib"] for gpu in document["machine"]["gpus"]]
    rows = [("stage", "processes", "one", "in all", "GPU memory, most", "memory", "disk")]
    for stage in document["stages"]:
        most = f"{max(stage['gpu_gib']):.1f} of {min(there):.1f} GiB" if stage["gpu_gib"] and there else "-"
        host = "-" if stage["memory_gib"] is None else f"{stage['memory_gib']:.1f} GiB"
        disk = f"{stage['disk_gib']:.2f} GiB" if stage["disk_gib"] else "-"
        one, whole = span(stage["one_s"]), span(stage["seconds"])
        rows.append((stage["stage"], str(stage["processes"]), one, whole, most, host, disk))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    disk, memory = document["disk"], document["machine"]["memory_gib"]
    lines.append("")
    lines.append(f"in all: {span(document['seconds'])}" + _money(document))
    least = "" if all(stage["fits"] for stage in document["stages"]) else "at least "
    lines.append(
        f"disk: {least}{disk['results_gib']:.1f} GiB of results and {disk['copies_gib']:.1f} of DVC's copies, "
        f"{disk['free_gib']:.1f} free; memory of the machine: {memory:.1f} GiB"
    )
    return "\n".join([*lines, *document["notes"], document["random_weights"]]) + "\n"


def _money(document: dict[str, Any]) -> str:
    if document["price"] is None:
        return ""
    return f", {document['price']:.2f} at {document['price_per_hour']:g} an hour"


def span(seconds: float | None) -> str:
    """A time for a person."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def reckoned(points: Sequence[Sequence[float]], sizes: Iterable[float]) -> float:
    """Seconds of work of all `sizes` together, by a straight line through `points` of size and seconds; neither a piece
    of work itself nor a unit of its size takes less than nothing. A point far beyond the others is something else's
    doing on this machine."""
    rate, usual = (statistics.median(found) for found in ([s / size for size, s in points], [s for _, s in points]))
    points = [(size, s) for size, s in points if s <= OUTLIER * max(usual, rate * size)]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    x, y, sizes = statistics.fmean(xs), statistics.fmean(ys), list(sizes)
    spread_x = sum((one - x) ** 2 for one in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread_x if spread_x else 0.0
    slope = min(max(slope, 0.0), y / x)
    return (y - slope * x) * len(sizes) + slope * sum(sizes)


def side_by_side(times: Iterable[float], places: int) -> float:
    """Seconds until all is done of what takes these `times`, so many at a time, the longest first."""
    ends = [0.0] * places
    for seconds in sorted(times, reverse=True):
        ends[ends.index(min(ends))] += seconds
    return max(ends)


@contextmanager
def scratch(params: Config) -> Iterator[Path]:
    """A folder on the disk of the results that is gone afterwards, however it ends."""
    top = params.artifacts.parent
    made = not top.exists()
    top.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".rehearse-", dir=top) as name:
            yield Path(name).absolute()
    finally:
        if made and not any(top.iterdir()):
            top.rmdir()


def look_around(params: Config, folder: Path) -> Machine:
    """This machine; a WorkFailedError where it has no GPU and the experiment needs some."""
    needed, memory = gpus_needed(params), params.needs.gpu_memory_gib
    (found,) = Parts(folder).do([("look", {"gpus": needed}, None)], {})
    if "refused" in found:
        raise WorkFailedError(f"looking around on this machine was {found['refused']}")
    if needed and not found["gpus"]:
        raise WorkFailedError(
            f"no GPU is visible, and {params.profile} needs {needed} of {memory:g} GiB; rehearse it where they are "
            "(CUDA_VISIBLE_DEVICES may hide them), or another profile, `kd rehearse --params profiles/mini.yaml`"
        )
    return Machine(found["gpus"], read_memory() / GIB, found["whole_s"] - found["measured_s"])


class Parts:
    """Processes that do parts of the experiment in a folder. Those still at work are ended with whoever waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, tasks: list[tuple[str, dict[str, Any], Place | None]], params: dict[str, Any]) -> list[Any]:
        """What each of `tasks` (part, options, its place or None for the whole machine) finds; they are done at the
        same time."""
        begun: list[tuple[str, Path, subprocess.Popen[bytes]]] = []
        try:
            for part, options, place in tasks:
                begun.append((part, *self._begin(part, options, place, params)))
            ends = _ends([process for _, _, process in begun])
            return [self._result(*one, ended) for one, ended in zip(begun, ends, strict=True)]
        finally:
            for _, _, process in begun:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _begin(
        self, part: str, options: dict[str, Any], place: Place | None, params: dict[str, Any]
    ) -> tuple[Path, subprocess.Popen[bytes]]:
        file = self.folder / f"{part}.json"
        file.write_text(json.dumps({"part": part, "params": params, "since": time.time(), **options}))
        code = str(Path(__file__).parents[2])
        paths = os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        environment |= place.environment() if place else {}
        print(f"rehearse: {part}", file=sys.stderr, flush=True)
        # In a session of its own, so that Ctrl-C comes to us alone, and we end it.
        return file, subprocess.Popen(
            [sys.executable, "-m", "kd.machine.parts", str(file)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _result(self, part: str, file: Path, process: subprocess.Popen[bytes], ended: float) -> dict[str, Any]:
        """What a process found; `whole_s` is its seconds from its start to its end."""
        status, found = process.wait(), file.with_suffix(".found")
        if status == -signal.SIGKILL:
            return {"refused": KILLED}
        if status or not found.exists():
            raise WorkFailedError(f"the rehearsal of {part} ended with status {status}; what it said stands above")
        result: dict[str, Any] = json.loads(found.read_text())
        return result | {"whole_s": ended - json.loads(file.read_text())["since"]}


def _ends(processes: Sequence[subprocess.Popen[bytes]]) -> list[float]:
    """Wait for processes; when each ended, in seconds since 1970."""
    ends: dict[int, float] = {}
    while len(ends) < len(processes):
        for process in processes:
            if process.poll() is not None:
                ends.setdefault(process.pid, time.time())
        time.sleep(POLL_S)
    return [ends[process.pid] for process in processes]


class Rehearsal:
    """One experiment's stages, one after another."""

    def __init__(self, params: Config, folder: Path, machine: Machine) -> None:
        self.params, self.folder, self.machine = params, folder, machine
        self.gpus = len(machine.gpus)
        self.parts = Parts(folder)
        self.lengths = row_lengths(params, folder)
        self.documents = {role: settings_of(getattr(params, role).model) for role in ("teacher", "student")}
        same = params.teacher.model == params.student.model
        self.models = {role: folder / ("model" if same else role) for role in self.documents}
        self.model_bytes = {role: write_stand_in(self.models[role], self.documents[role]) for role in self.documents}
        self.places = max(1, min(self.gpus, room_for(self.model_bytes["student"], int(machine.memory_gib * GIB))))
        self.prompt = sorted(params.prompts, key=lambda name: len(params.prompts[name]))[len(params.prompts) // 2 :][:1]
        self.task = self._stand_in_params()
        self._write_data()

    def stages(self) -> tuple[list[Stage], dict[str, Any], list[str]]:
        """Every stage; the disk; and what was taken for granted."""
        params = self.params
        head, teacher = Stage("head", min(1, len(params.prompts))), Stage("teacher", len(params.prompts))
        train, assess = Stage("train", len(params.adapters)), Stage("assess", len(params.experiments))
        captured = self._capture(head, teacher) if params.prompts else None
        trained, assessed = self._students(train, assess, captured)
        rest = self._rest(captured, trained, assessed)
        weights, note = self._weights(teacher.processes, train.processes + assess.processes)
        disk = self._disk(head, teacher, train)
        stages = [stage for stage in (weights, head, teacher, train, assess, rest) if stage.processes]
        return stages, disk, [*self._notes(), note]

    def _capture(self, head: Stage, teacher: Stage) -> dict[str, Any] | None:
        """`kd head` and `kd teacher`: what the latter found."""
        params, backend = self.params, self.params.teacher.backend
        missing = self._lack("teacher", params.teacher.dtype) if backend == "transformers" else None
        if missing:
            for stage in (head, teacher):
                stage.refuse(missing)
            return None
        (kept,) = self.parts.do([("head", {}, None)], self.task)
        if self._refused(head, kept, "take a GPU with more memory, or another profile"):
            teacher.refuse("it was not tried, for the head could not be kept")
            return None
        head.one_s = head.seconds = kept["whole_s"] - kept["made_up_s"]
        rows = params.teacher.batch_rows
        lower = f"lower `teacher.batch_rows` ({rows}), " if rows > 1 else ""
        (found,) = self.parts.do([("teacher", {"prompt": self.prompt[0]}, None)], self.task)
        if self._refused(teacher, found, f"{lower}take GPUs with more memory, or another profile"):
            return None
        each = {}
        for prompt, lengths in found["lengths"].items():
            sizes = batch_tokens(lengths, found["shard"], rows)
            seen = Counter(sizes)
            each[prompt] = (
                _fixed(found)
                + reckoned(found["forwards"], sizes)
                + found["first_s"] * len(seen)
                + found["second_s"] * sum(count > 1 for count in seen.values())
                + (found["keep_s"] + found["settle_s"]) * len(lengths)
            )
        teacher.take(each, places=1)
        tokens = sum(map(sum, found["lengths"].values()))
        teacher.disk_gib = tokens * found["store_bytes"] / GIB
        head.disk_gib = _size(self._artifacts("teacher", "head"))
        result: dict[str, Any] = found
        return result

    def _students(
        self, train: Stage, assess: Stage, captured: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """`kd train` and `kd assess`, at the same time where there are GPUs for it: what they found."""
        params = self.params
        missing = self._lack("student", params.student.dtype)
        if missing:
            for stage in (train, assess):
                stage.refuse(missing)
            return None, None
        kinds = {self.prompt[0]: run_name(f"{self.prompt[0]}-kd", params.seeds[0])} if captured else {}
        if params.controls:
            kinds[""] = run_name(params.controls[0], params.seeds[0])
        ways, named = self._ways()
        adapters = [one.adapter for one in params.experiments.values() if one.adapter]
        tasks: list[tuple[str, dict[str, Any]]] = [("train", {"kinds": kinds})] if kinds else []
        tasks.append(("assess", {"ways": ways, "experiment": adapters[0] if adapters else None}))
        if self.places > 1:
            places = places_for(gpu_names(self.gpus)[: self.places])
            found = self.parts.do([(*task, place) for task, place in zip(tasks, places, strict=False)], self.task)
        else:
            found = [self.parts.do([(*task, None)], self.task)[0] for task in tasks]
        trained = found[0] if kinds else None
        assessed = found[-1]
        if trained is None or self._refused(train, trained, "take a GPU with more memory, or another profile"):
            trained = None
        elif captured or not params.prompts:
            each = {name: self._student(trained, one.prompt, captured) for name, one in params.adapters.items()}
            train.take(each, self.places, once=trained["compiled_s"])
            train.disk_gib = _size(self._artifacts("adapters")) * len(params.adapters)
        if self._refused(assess, assessed, "take a GPU with more memory, or another profile"):
            return trained, None
        fixed = _fixed(assessed)
        answers = [_answers(found, len(way["lengths"])) for way, found in zip(ways, assessed["ways"], strict=True)]
        each = {name: fixed + answers[way] for name, way in named.items()}
        assess.take(each, self.places, once=assessed["compiled_s"])
        return trained, assessed

    def _student(self, trained: dict[str, Any], prompt: str | None, captured: dict[str, Any] | None) -> float:
        """Seconds of one `kd train`."""
        settings, kind = self.params.distill, trained["kinds"][self.prompt[0] if prompt else ""]
        updates = len(kind["all"]) * settings.epochs
        checkpoints = ceil(updates / settings.checkpoint_every)
        verified = 0.0
        if prompt and captured:
            verified = sum(captured["lengths"][prompt]) * captured["store_bytes"] / self._hash_speed()
        return float(
            _fixed(trained)
            + reckoned(kind["updates"], kind["all"]) * settings.epochs
            + trained["once_s"]
            + kind["recording_s"] * kind["recordings"]
            + trained["test_row_s"] * len(self.lengths["test"])
            + trained["checkpoint_s"] * checkpoints
            + trained["log_s"] * updates
            + verified
        )

    def _rest(self, captured: Any, trained: Any, assessed: Any) -> Stage:
        """Everything else: `inputs`, `prepare`, `statistics`, `report`, `attention`, and what DVC does around them."""
        params = self.params
        stage = Stage("report", 5, note="inputs, prepare, statistics, report, attention, and DVC around all stages")
        if assessed is None or (params.adapters and trained is None) or (params.prompts and captured is None):
            return stage
        start, statistics_s = self.machine.start_s, 0.0
        if captured:
            (found,) = self.parts.do([("rest", {"prompt": self.prompt[0]}, None)], self.task)
            if "refused" not in found:
                statistics_s = found["measured_s"] * len(params.prompts)
                stage.memory_gib = found["host_gib"]
        kinds = trained["kinds"].values() if trained else []
        step = max((statistics.fmean(seconds for _, seconds in kind["updates"]) for kind in kinds), default=0.0)
        questions = min(params.attention.questions, params.dataset.test_rows)
        attention = len(params.experiments) * (assessed["load_s"] + questions * step * STEP_SHARE)
        commands = 6 + len(params.prompts) + len(params.adapters) + len(params.experiments)
        stage.seconds = 5 * start + statistics_s + attention + REPORT_S + commands * COMMAND_S
        stage.one_s = stage.seconds / stage.processes
        return stage

    def _weights(self, captures: int, students: int) -> tuple[Stage, str]:
        """Reading the models' files from the disk, which stand-ins are not: once for their checksums; and once for each
        process that loads them where the machine's memory does not keep them."""
        speed, where = self._read_speed()
        stage, passes = Stage("weights", 1), {"teacher": captures, "student": students}
        seconds = 0.0
        if self.params.teacher.model == self.params.student.model:
            passes = {"student": captures + students}
        for role, processes in passes.items():
            size = self.model_bytes[role]
            seconds += size / speed * (1 if size < self.machine.memory_gib * GIB / 2 else 1 + processes)
        stage.one_s = stage.seconds = seconds
        total = sum(self.model_bytes[role] for role in passes) / GIB
        note = (
            f"weights: {total:.1f} GiB read at {speed / 1e9:.2f} GB/s, {where}: once for their checksums, and again "
            "for each process where memory does not keep them (all else of loading is in the stages); their download "
            "is not counted."
        )
        return stage, note

    def _disk(self, *stages: Stage) -> dict[str, Any]:
        """What results, DVC's copies of them and models take, and whether those that are not here yet fit."""
        results = sum(stage.disk_gib for stage in stages) + 0.01
        place = read_disk(self.params.artifacts, [self.params.artifacts])
        owed = max(0.0, results - place.held / GIB)
        models = sum(
            size / GIB
            for role, size in self.model_bytes.items()
            if isinstance(model := getattr(self.params, role).model, HubModel) and not hub.is_cached(model)
        )
        cache = read_disk(hub.cache(), [])
        copies = read_disk(copies_folder(), [])
        coming = [Owed(RESULTS, owed, place), Owed(COPIES, owed, copies), Owed(MODELS, models, cache)]
        why = shortage(self.params, coming)
        return {
            "results_gib": results,
            "copies_gib": results,
            "free_gib": place.free / GIB,
            "models_gib": models,
            "models_free_gib": cache.free / GIB,
            "fits": why is None,
            "why": why,
        }

    def _ways(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """How the test questions are asked, each way once; and which way each row of the table is asked."""
        ways: list[dict[str, Any]] = []
        named, count = {}, token_counter(self.params.student.model)
        context = self.documents["student"]["max_position_embeddings"]
        for name, experiment in self.params.experiments.items():
            more = 1 + count(experiment.suffix)
            lengths = [question + more for question, _ in self.lengths["test"]]
            limit = max(1, min(experiment.max_new_tokens, context - max(lengths)))
            way = {"lengths": lengths, "limit": limit, "stop": list(experiment.stop)}
            if way not in ways:
                ways.append(way)
            named[name] = ways.index(way)
        return ways, named

    def _lack(self, role: str, dtype: str) -> str | None:
        """Why a model that transformers runs cannot be held, by its weights alone; None where it can."""
        named = tensors(self.models[role])
        weights = sum(prod(shape) for _, shape in named.values()) * BYTES[dtype] / GIB
        if role == "student" and self.params.prompts:
            shape = self.documents["teacher"]
            weights += shape["vocab_size"] * shape["hidden_size"] * BYTES[self.params.teacher.dtype] / GIB
        where, there = "memory", self.machine.memory_gib
        if self.gpus:
            where, there = "the smallest GPU", min(gpu["gib"] for gpu in self.machine.gpus)
        if weights <= there:
            return None
        return (
            f"its weights take {weights:.1f} GiB, and {where} has {there:.1f}; take a machine with more, or a smaller "
            "profile, such as `kd rehearse --params profiles/mini.yaml`"
        )

    def _refused(self, stage: Stage, found: dict[str, Any], mend: str) -> bool:
        """Whether a part was refused, which then counts for its stage; else what memory it took does."""
        if "refused" in found:
            stage.refuse(f"{found['refused']}; {mend}" if found.get("memory") else found["refused"])
            return True
        stage.gpu_gib, stage.memory_gib = found.get("gpu_gib", []), found["host_gib"]
        return False

    def _stand_in_params(self) -> dict[str, Any]:
        """Params of the parts: stand-ins for models and for texts."""
        import random

        params, draw = self.params, random.Random(0)
        document = params.model_dump(mode="json")
        size, count = self.documents["student"]["vocab_size"], token_counter(params.student.model)
        for prompt, said in params.prompts.items():
            document["prompts"][prompt] = words(draw, count(said), size) + " " if said else ""
        for role, folder in self.models.items():
            document[role]["model"] = {"source": "folder", "path": str(folder)}
        return document | {"launcher": ""}

    def _write_data(self) -> None:
        folder, size = self._artifacts("data"), self.documents["student"]["vocab_size"]
        together = self.params.teacher.batch_rows
        rows = max(ROWS_GPU, 16 * together) if self.gpus else max(ROWS_CPU, 4 * together)
        write_rows(folder / "train.jsonl", spread(self.lengths["train"], rows), size)
        write_rows(folder / "test.jsonl", spread(self.lengths["test"], TEST_ROWS if self.gpus else ROWS_CPU), size)
        write_rows(folder / ALL, self.lengths["train"], size)

    def _artifacts(self, *names: str) -> Path:
        return self.folder.joinpath(self.params.artifacts, *names)

    def _hash_speed(self) -> float:
        """Bytes a second that a store is compared with its checksums at, on this machine's cores."""
        start = time.perf_counter()
        hashlib.sha256(bytes(2**25)).digest()
        return 2**25 / (time.perf_counter() - start) * min(8, len(os.sched_getaffinity(0)))

    def _read_speed(self) -> tuple[float, str]:
        """Bytes a second from the disk of the weights where they are here, else from that of the results."""
        largest = max(self.model_bytes, key=lambda role: self.model_bytes[role])
        file = find_weights(getattr(self.params, largest).model)
        where = "as measured on them" if file else f"as measured beside the results, for the {largest}'s are not here"
        if file is None:
            file = self.folder / "speed"
            with file.open("wb") as target:
                target.write(os.urandom(2**20) * (SPEED_BYTES // 2**20))
                target.flush()
                os.fsync(target.fileno())
        with file.open("rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start, done = time.perf_counter(), 0
            while done < SPEED_BYTES and (piece := source.read(2**22)):
                done += len(piece)
        return max(done, 1) / (time.perf_counter() - start), where

    def _notes(self) -> list[str]:
        how = ""
        if self.gpus > 1:
            how = f"students are trained, and answer, side by side on {self.places} GPUs; "
            if self.places < self.gpus:
                how += f"{self.gpus - self.places} more stay idle, for the host's memory loads no more at once; "
        if not self.gpus:
            how = "one stage after another, by all cores; `kd students` shares them out and takes less; "
        return [f"times: {how}every answer is taken to go on to its limit."]


def find_weights(model: Model) -> Path | None:
    """The largest file of a model's weights, if they are here."""
    place = find_model_folder(model)
    files = sorted(place.glob("*.safetensors"), key=lambda path: path.stat().st_size) if place else []
    return files[-1] if files else None


def find_model_folder(model: Model) -> Path | None:
    """Where a model lies on this machine, if it does."""
    if isinstance(model, HubModel):
        return hub.snapshot(model) if hub.is_cached(model) else None
    found = find_model(model).found
    return Path(found) if found and Path(found).is_dir() else None


def _fixed(found: dict[str, Any]) -> float:
    """Seconds of a stage that do not depend on its rows: starting, loading and ending."""
    return float(found["whole_s"] - found["made_up_s"] - found["compiled_s"] - found["measured_s"])


def _answers(way: dict[str, Any], rows: int) -> float:
    """Seconds of all answers asked for in one way."""
    whole, left = divmod(rows, way["slots"])
    finished = rows * way["full"]["row_s"]
    if not whole:
        return float(way["full"]["seconds"] + finished)
    last = way["last"]["seconds"] if left else 0.0
    return float(way["full"]["seconds"] + (whole - 1) * way["full"]["again_s"] + last + finished)


def _size(folder: Path) -> float:
    """GiB of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GIB
