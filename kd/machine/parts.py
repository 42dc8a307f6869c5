"""Parts of an experiment, done by the stages' own code on stand-ins for its models, and measured.

A part is a process of its own, as a stage is: `python -m kd.machine.parts TASK.json`, in a folder that has the rows
and the stand-ins. It writes what it found beside its task. benchmarks/paper.py measures captures and heads by the
same functions.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import fingerprint
from kd.config import Config, FolderModel
from kd.data.rows import read_examples
from kd.errors import UserError, WorkFailedError
from kd.io.files import put_in_place
from kd.machine.record import write_record
from kd.machine.stand_in import MadeUp, made_up_weights
from kd.store.head import HEAD_FOLDER, read_head_manifest
from kd.store.records import ModelIdentity, Reading
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.capture import fill

if TYPE_CHECKING:
    import torch

    from kd.assess.row import Row

GIB = 2**30
DECODE_CPU_S, DECODE_GPU_S = 6.0, 60.0  # about the most that decoding one batch of rows may take
TRAIN_CPU_S, TRAIN_GPU_S = 4.0, 10.0
WARM_ROWS, WARM_TOKENS = 128, 24
ROUNDS = 6  # over the questions, by a teacher that is ahead, so that the end of a capture does not count for much
ALL = "all.jsonl"  # all training rows, where train.jsonl has some
# Who made a store of which nothing is kept: a stand-in's own identity has the checksum of files that are holes.
NOBODY = ModelIdentity(name="random", revision=None, weights=None, dtype="float16", backend="exllamav2", versions={})


class Clock:
    """Seconds that stand still while Triton compiles a kernel, which it does once a machine and not in every stage."""

    def __init__(self) -> None:
        self.compiled = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.compiled

    def leave_out_compiling(self) -> None:
        """From now on, in this process."""
        from kd.kernels import lacking

        if lacking():
            return
        from triton import compiler
        from triton.backends.nvidia import driver

        compiler.compile = self._noted(compiler.compile)
        driver.compile_module_from_src = self._noted(driver.compile_module_from_src)  # kernels' launchers, in C

    def _noted(self, compile_it: Callable[..., Any]) -> Callable[..., Any]:
        """What does the same; its time is added to `compiled`."""

        def noted(*given: Any, **named: Any) -> Any:
            start, before = time.perf_counter(), self.compiled
            try:
                return compile_it(*given, **named)
            finally:
                self.compiled = before + time.perf_counter() - start  # what it asked for in between is in it

        return noted


clock = Clock()


class Watched:
    """A teacher whose forwards are noted: when each came, and of how many tokens it was, padding included."""

    def __init__(self, teacher: backends.LoadedTeacher) -> None:
        self.teacher = teacher
        self.ticks: list[tuple[float, int, int]] = []  # seconds, tokens, questions

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        sizes: list[tuple[int, int]] = []

        def noted() -> Generator[list[list[int]], None, None]:
            for batch in batches:
                sizes.append((len(batch) * max(map(len, batch)), len(batch)))
                yield batch

        with closing(self.teacher.states(noted())) as stream:
            for number, states in enumerate(stream):
                self.ticks.append((clock(), *sizes[number]))
                yield states

    def intervals(self, ended: float) -> list[tuple[int, float]]:
        """Tokens of each forward but the first, and the seconds from the result before it to its own; each its share
        longer where not all was done, and on the disk, with the last of them, but when it `ended`."""
        (first, *_), (last, *_) = self.ticks[0], self.ticks[-1]
        share = (ended - first) / (last - first) if last > first else 1.0
        return [(tokens, (now - before) * share) for (before, *_), (now, tokens, _) in pairwise(self.ticks)]


class Silent:
    """In the place of a progress bar."""

    def update(self, count: int = 1) -> None:
        """Nothing."""


def capture_into(
    teacher: backends.LoadedTeacher, wanted: list[Reading], rows: int, writer: StoreWriter, bar: Any = None
) -> Watched:
    """Let a loaded teacher read all of `wanted`, `rows` a forward, as `kd teacher` does it."""
    watched = Watched(teacher)
    shards = list(range(ceil(len(wanted) / writer.shard_examples)))
    fill(watched, wanted, writer, shards, rows, bar or Silent())
    return watched


def gpu_use() -> list[float]:
    """GiB in use on each GPU, this process' and all others'."""
    import torch

    found = []
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
        free, there = torch.cuda.mem_get_info(gpu)
        found.append((there - free) / GIB)
    return found


def look() -> dict[str, Any]:
    """The GPUs of this machine."""
    import torch

    found = [torch.cuda.get_device_properties(gpu) for gpu in range(torch.cuda.device_count())]
    return {"gpus": [{"name": gpu.name, "gib": gpu.total_memory / GIB} for gpu in found]}


def head(params: Config, _: dict[str, Any]) -> dict[str, Any]:
    """`kd head`."""
    from kd.teacher.capture import keep_head

    with made_up(params.teacher.model, params.teacher.backend) as weights:
        keep_head(params)
    return {"made_up_s": weights.seconds, "gpu_gib": gpu_use()}


def teacher(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd teacher` on some questions: what a forward takes by its tokens, and what stays to be done at its end."""
    from kd.models.load import load_tokenizer, model_folder
    from kd.protocol.reading import readings
    from kd.teacher.capture import capture_key, prompt_record, tokenization

    prompt, rows = task["prompt"], params.teacher.batch_rows
    key = capture_key(params, prompt)
    tokenizer = load_tokenizer(model_folder(params.teacher.model))
    examples = read_examples(params.artifacts / "data" / "train.jsonl")
    wanted = readings(params.distill, params.prompts[prompt], tokenizer, examples)
    start = clock()
    everything = read_examples(params.artifacts / "data" / ALL)
    lengths = {
        name: [len(reading.token_ids) for reading in readings(params.distill, text, tokenizer, everything)]
        for name, text in params.prompts.items()
    }
    most, lengths_s = max(map(max, lengths.values())), clock() - start
    start = clock()
    with made_up(params.teacher.model, params.teacher.backend) as weights:
        loaded = backends.load(params.teacher, most)
    load_s = clock() - start - weights.seconds
    longest = [[2 + i % 7 for i in range(most)]] * rows
    # As much memory as any other takes. What libraries take the first time counts as starting.
    (_, _), (_, longest_s) = _alone(loaded, [longest, longest])
    start = clock()
    target = params.artifacts / "teacher" / prompt
    about = (backends.identity(params.teacher), prompt_record(params, prompt), tokenization(tokenizer, params.distill))
    work, beside = (target.with_name(f"{prompt}.{end}") for end in ("work", "beside"))
    for folder in (work, beside):
        folder.mkdir(parents=True)
    writer, other = (StoreWriter(folder, *about, key=key, batch_rows=rows) for folder in (work, beside))
    ahead = _ahead(loaded, wanted, rows, other) if _is_ahead(params) else {}
    watched = capture_into(loaded, wanted, rows, writer)
    ended = clock()
    writer.finish(read_head_manifest(params.artifacts / "teacher" / HEAD_FOLDER).sha256)
    put_in_place(work, target)
    settled = clock() - ended
    shutil.rmtree(beside)
    found = {"forwards": watched.intervals(ended), "first_s": 0.0, "second_s": 0.0, "keep_s": 0.0} | ahead
    return found | {
        "made_up_s": weights.seconds,
        "load_s": load_s,
        "measured_s": clock() - start + lengths_s + 2 * longest_s,
        "lengths": lengths,
        "shard": writer.shard_examples,
        "settle_s": settled / len(wanted),
        "store_bytes": sum(path.stat().st_size for path in target.iterdir()) / sum(len(r.token_ids) for r in wanted),
        "gpu_gib": gpu_use(),
    }


def _is_ahead(params: Config) -> bool:
    """Whether the teacher gives states that its GPU has not computed yet."""
    import torch

    return params.teacher.backend == "transformers" and torch.cuda.is_available()


def _ahead(teacher: backends.LoadedTeacher, wanted: list[Reading], rows: int, writer: StoreWriter) -> dict[str, Any]:
    """Of a teacher that is ahead: its forwards, each to its end; what the first and the second of a length take beyond
    the later ones, for it is recorded when it comes again; and what a capture takes beyond them, a question."""
    by_length = {len(reading.token_ids): [reading.token_ids] * rows for reading in wanted}
    first, second, usual = (_alone(teacher, by_length.values()) for _ in range(3))
    mean = statistics.fmean(seconds for _, seconds in usual)
    many = [replace(one, example_id=f"{one.example_id}, {again}") for again in range(ROUNDS) for one in wanted]
    watched = capture_into(teacher, many, rows, writer)
    known = dict(usual)
    keeping = statistics.fmean(seconds - known.get(size, mean) for size, seconds in watched.intervals(clock()))
    return {
        "forwards": usual,
        "first_s": max(0.0, statistics.fmean(seconds for _, seconds in first) - mean),
        "second_s": max(0.0, statistics.fmean(seconds for _, seconds in second) - mean),
        "keep_s": max(0.0, keeping) / rows,
    }


def _alone(teacher: backends.LoadedTeacher, batches: Iterable[list[list[int]]]) -> list[tuple[int, float]]:
    """Forwards one after another, each to its end: their tokens, and seconds."""
    import torch

    found = []
    for batch in batches:
        start = clock()
        for _ in teacher.states([batch]):
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((len(batch) * max(map(len, batch)), clock() - start))
    return found


def train(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd train` on some rows, for each kind of student: what an update takes by its tokens, and a graph's recording;
    and what stays to be done once, or for each test row, checkpoint and update."""
    clock.leave_out_compiling()
    with made_up(params.student.model, "transformers") as weights:
        (first, experiment), *others = task["kinds"].items()
        found = _train_first(params, experiment, weights)
        found["kinds"] = {first: found.pop("kind")}
        start = clock()
        base = found.pop("base")
        for kind, experiment in others:
            _empty_cache()
            found["kinds"][kind] = _updates(*_beginning(params, experiment, base)[1:], params)
        found["measured_s"] += clock() - start
        found["once_s"] = sum(kind.pop("once_s") for kind in found["kinds"].values())
        found["log_s"] = _log_seconds(params.artifacts / "loss")
    return found | {"made_up_s": weights.seconds, "compiled_s": clock.compiled}


def _train_first(params: Config, experiment: str, weights: MadeUp) -> dict[str, Any]:
    """All that `kd train` does. `measured_s` is what depends on the number of rows."""
    from kd.distill import checkpoint
    from kd.distill.adapter import save_adapter
    from kd.distill.train import evaluate, run_key

    run_key(params, experiment)
    start = clock()
    student, step, lesson = _beginning(params, experiment)
    load_s = clock() - start - weights.seconds
    work = params.artifacts / "adapters" / experiment
    work.mkdir(parents=True)

    def check() -> None:
        evaluate(student.get_base_model(), lesson.check, None, None, params.distill)

    check()  # what libraries take the first time counts as starting
    start = clock()
    kind = _updates(step, lesson, params)
    test_s = _timed(check)
    checkpoint_s = _timed(lambda: checkpoint.save(work / "checkpoints", step.descent, []))
    measured_s, used = clock() - start, gpu_use()
    shutil.rmtree(work / "checkpoints")
    save_adapter(student, params, experiment, lesson.matches, work)
    return {
        "base": student.unload(),
        "load_s": load_s,
        "kind": kind,
        "test_row_s": test_s / max(1, len(lesson.check)),  # the original's check is `published`'s alone
        "checkpoint_s": checkpoint_s,
        "measured_s": measured_s,
        "gpu_gib": used,
    }


def _beginning(params: Config, experiment: str, base: Any = None) -> tuple[Any, Any, Any]:
    """What `kd train` begins with: the student (of `base`, where that is loaded), its step, and what it learns from."""
    from kd.distill.adapter import add_lora, fresh_student
    from kd.distill.lesson import prepare_lesson
    from kd.distill.step import make_step

    adapter = params.adapters[experiment]
    lesson = prepare_lesson(params, adapter.prompt)
    student = add_lora(base, params, adapter.dropout).train() if base else fresh_student(params, experiment)
    return student, make_step(student, lesson.head, params.distill), lesson


def _updates(step: Any, lesson: Any, params: Config) -> dict[str, Any]:
    """Rounds over the lesson: tokens and seconds of each update but the first ones, and the seconds of a recording;
    and the tokens of all updates, and the recordings, of the whole stage."""
    from kd.distill.step import GraphStep
    from kd.distill.train import descend

    settings, matches = params.distill, lesson.matches.kept
    batches, sizes = _batched(matches, settings.batch_rows)
    all_batches, all_sizes = _batched(_all_matches(params, lesson), settings.batch_rows)
    graphs = isinstance(step, GraphStep)
    budget, rounds = (TRAIN_GPU_S, 64) if graphs else (TRAIN_CPU_S, 3)
    endless = settings.model_copy(update={"epochs": rounds})
    ticks = [clock()]
    with closing(descend(step, matches, lesson.states, endless)) as records:  # type: ignore[type-var]
        for _ in records:
            ticks.append(clock())
            whole = len(ticks) - 1 >= (2 * len(batches) if graphs else 4)
            if whole and ticks[-1] - ticks[0] > budget:
                break
    times = [later - earlier for earlier, later in pairwise(ticks)]
    first = len(batches) if graphs else 1
    steady = [(sizes[i % len(sizes)], seconds) for i, seconds in enumerate(times) if i >= first]
    shapes = {shape_of(batch, step.bucket) for batch in batches}
    again = statistics.fmean(seconds for _, seconds in steady) if steady else times[0]
    once, recording = _recordings([seconds - again for seconds in times[:first]], len(shapes)) if graphs else (0.0, 0.0)
    return {
        "updates": steady or [(sizes[0], times[0])],
        "once_s": once,
        "recording_s": recording,
        "all": all_sizes,
        "recordings": len({shape_of(batch, step.bucket) for batch in all_batches}) if graphs else 0,
    }


def _recordings(extra: list[float], shapes: int) -> tuple[float, float]:
    """What the first updates took beyond later ones, as seconds once (libraries load their kernels, the allocator its
    memory) and seconds for each recorded shape."""
    recording = max(0.0, statistics.median(sorted(extra)[-shapes:]))
    return max(0.0, sum(extra) - recording * shapes), recording


def _batched(matches: list[Any], rows: int) -> tuple[list[list[Any]], list[int]]:
    """What makes an update each, and its tokens."""
    batches = [matches[i : i + rows] for i in range(0, len(matches), rows)]
    return batches, [sum(len(match.input_ids) + len(match.labels) for match in batch) for batch in batches]


def _all_matches(params: Config, lesson: Any) -> list[Any]:
    """What `lesson` would be of all rows."""
    from kd.models.load import load_tokenizer, model_folder
    from kd.protocol.alignment import match_examples
    from kd.protocol.reading import readings

    tokenizer, settings = load_tokenizer(model_folder(params.student.model)), params.distill
    everything = read_examples(params.artifacts / "data" / ALL)
    text = lesson.store.manifest.prompt.text if lesson.store else ""
    stored = readings(settings, text, tokenizer, everything) if lesson.store else None
    return match_examples(settings.protocol, everything, tokenizer, settings.max_tokens, stored, settings.quirks).kept


def shape_of(batch: Sequence[Any], bucket: int) -> tuple[int, int, int]:
    """Which CUDA graph an update needs (kd/distill/step.py)."""
    width = max(len(match.input_ids) for match in batch)
    height = sum(len(match.labels) for match in batch)
    return len(batch), ceil(width / bucket), ceil(height / (bucket * len(batch)))


def assess(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd assess`: what reading and continuing a full batch of rows takes, and what the last rows take."""
    from kd.assess.decode import slot_count
    from kd.assess.generate import Ending
    from kd.assess.row import Row
    from kd.distill.adapter import fresh_student
    from kd.models.load import load_tokenizer, model_folder

    clock.leave_out_compiling()
    fingerprint.code_sha256("kd.assess.run")  # a part of its key
    tokenizer = load_tokenizer(model_folder(params.student.model))
    start = clock()
    with made_up(params.student.model, "transformers") as weights:
        student = fresh_student(params, task["experiment"]) if task["experiment"] else _bare(params)
        student = student.merge_and_unload().eval() if task["experiment"] else student
    load_s = clock() - start - weights.seconds
    gpu = student.device.type == "cuda"
    used, ways = gpu_use(), []
    warmed_s = [_warm_up(student, tokenizer) for _ in range(2)] if gpu else [0.0]
    start = clock()
    for way in task["ways"]:
        lengths, limit, ending = way["lengths"], way["limit"], Ending(tokenizer, frozenset(), way["stop"])
        longest = max(lengths) + limit
        slots = slot_count(student, len(lengths), params.assess.batch_tokens, longest)
        waves = []
        for count in (slots, len(lengths) % slots):
            if not count or count > len(lengths):
                continue
            step = len(lengths) / count
            chosen = [sorted(lengths)[int((i + 0.5) * step)] for i in range(count)]
            rows = [Row(i, [2 + j % 11 for j in range(length)], limit) for i, length in enumerate(chosen)]
            waves.append(_wave(student, rows, params.assess.batch_tokens, longest, ending, gpu))
            waves[-1]["row_s"] = _finishing(rows, ending, params.artifacts)
            used = list(map(max, used, waves[-1].pop("gpu_gib")))
        ways.append({"slots": slots, "full": waves[0], "last": waves[1] if len(waves) > 1 else None})
    return {
        "made_up_s": weights.seconds,
        "compiled_s": clock.compiled,
        "load_s": load_s,
        "measured_s": clock() - start + 2 * warmed_s[-1],
        "ways": ways,
        "gpu_gib": used,
    }


def _warm_up(student: Any, tokenizer: Any) -> float:
    """Seconds of some short answers. The first time libraries load what they need, which counts as starting."""
    from kd.assess.generate import Ending
    from kd.assess.row import Row

    rows = [Row(i, [2] * 64, WARM_TOKENS) for i in range(WARM_ROWS)]
    return _timed(lambda: _wave(student, rows, WARM_ROWS * 128, 128, Ending(tokenizer, frozenset()), gpu=True))


def _finishing(rows: list[Row], ending: Any, folder: Path) -> float:
    """Seconds that an answer takes when it has ended: its text, and keeping it."""
    from kd.assess.journal import Journal

    for row in rows:
        row.new += [2] * (row.limit - len(row.new))  # of a batch that was broken off
    (work := folder / "journal").mkdir()
    taken = _timed(lambda: Journal(work, 0).add({row.index: ending.response(row) for row in rows}))
    shutil.rmtree(work)
    return taken / len(rows)


def _wave(model: Any, rows: list[Row], batch_tokens: int, longest: int, ending: Any, gpu: bool) -> dict[str, Any]:
    """Seconds of rows that begin and end together: the first time, and again when CUDA graphs are recorded."""
    from kd.assess.ahead import kernels_for
    from kd.assess.decode import decode

    budget, limit = (DECODE_GPU_S if gpu else DECODE_CPU_S), rows[0].limit
    start, ticks = clock(), []  # when the rows had how many tokens: some more at each look
    kernels = kernels_for(model)
    with closing(decode(model, rows, batch_tokens, longest, ending.reached, operations=kernels)) as steps:  # type: ignore[type-var]
        for ended in steps:
            ticks.append((clock(), len(rows[0].new)))
            if ended or (ticks[-1][0] - start > budget and len(ticks) > 5):
                break
        used = gpu_use()
    _empty_cache()
    looks = [tick for tick in ticks if tick[1]] or ticks[-1:]
    reading, said = looks[0][0] - start, looks[-1][1]
    times = [(later - earlier, more - fewer) for (earlier, fewer), (later, more) in pairwise(looks)]
    each = [seconds / tokens for seconds, tokens in times if tokens]
    left = max(0, limit - said) * statistics.median(each[-max(3, len(each) // 4) :]) if each else 0.0
    usual = statistics.median(each) if each else 0.0
    again = reading + sum(min(seconds, 2 * usual * tokens) for seconds, tokens in times) + left
    seconds = reading + sum(seconds for seconds, _ in times) + left
    return {"seconds": seconds, "again_s": again, "measured_steps": max(0, said - 1), "gpu_gib": used}


def rest(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd statistics` of the store that is here."""
    from kd.analysis.certainty import measure_prompts

    start = clock()
    measure_prompts(params.model_copy(update={"prompts": {task["prompt"]: params.prompts[task["prompt"]]}}))
    return {"measured_s": clock() - start}


def made_up(model: Any, backend: str) -> Any:
    """Random weights for a stand-in."""
    assert isinstance(model, FolderModel)
    return made_up_weights(model.folder, backend)


def _bare(params: Config) -> Any:
    from kd.models.adapters import load_student
    from kd.models.load import default_device, model_folder

    return load_student(model_folder(params.student.model), params.student.dtype, None, default_device())


def _log_seconds(folder: Path) -> float:
    """What the loss curve takes an update, without what dvclive takes once, which counts as starting."""
    from kd.distill.checkpoint import Record
    from kd.distill.train import loss_curve

    records = [Record(number, [], 1.0, 1.0, 1.0, 1.0) for number in range(1, 51)]
    with loss_curve(folder, []) as log:
        return _timed(lambda: [log(record) for record in records]) / len(records)


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _timed(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


PARTS = {work.__name__: work for work in (head, teacher, train, assess, rest)}


def _done(task: dict[str, Any]) -> dict[str, Any]:
    """What a task finds; a record is kept of it, as of every command that makes something."""
    params, began = Config.model_validate(task["params"]), datetime.now().astimezone()
    found = PARTS[task["part"]](params, task)
    write_record(params, task["part"], began)
    return found


def main() -> None:
    """Do the task of a file; its result, or why it was refused, comes beside it."""
    file = Path(sys.argv[1])
    task = json.loads(file.read_text())
    try:
        found = look() if task["part"] == "look" else _done(task)
    except (UserError, WorkFailedError) as error:
        found = {"refused": str(error)}
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        found = {"refused": "out of memory: " + " ".join(str(error).split())[:200], "memory": True}
    found["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file.with_suffix(".found"))


if __name__ == "__main__":
    main()
