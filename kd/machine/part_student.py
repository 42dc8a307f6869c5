"""A part of a student's stages, done by their own code on stand-ins and measured: `kd train`, `kd assess`."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kd import fingerprint
from kd.config import Config
from kd.data.rows import read_examples
from kd.machine.lengths import ALL
from kd.machine.measure import clock, gpu_use, timed
from kd.machine.stand_in import made_up_weights

if TYPE_CHECKING:
    from kd.assess.row import Row

DECODE_CPU_S, DECODE_GPU_S = 6.0, 60.0  # about the most that decoding one batch of rows may take
TRAIN_CPU_S, TRAIN_GPU_S = 4.0, 10.0
WARM_ROWS, WARM_TOKENS = 128, 24


def train(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd train` on some rows, for each kind of student: what an update takes by its tokens, and a graph's recording;
    and what stays to be done once, or for each test row, checkpoint and update."""
    clock.leave_out_compiling()
    with made_up_weights(params.student.model, "transformers") as weights:
        (first, experiment), *others = task["kinds"].items()
        found = _train_first(params, experiment)
        found["kinds"] = {first: found.pop("kind")}
        start = clock()
        base = found.pop("base")
        for kind, experiment in others:
            _empty_cache()
            found["kinds"][kind] = _updates(*_beginning(params, experiment, base)[1:], params)
        found["measured_s"] += clock() - start
        # The first kind's has what the clock leaves in of compiling; stages, their kernels compiled, take none of it.
        found["once_s"] = min(kind.pop("once_s") for kind in found["kinds"].values())
        found["log_s"] = _log_seconds(params.artifacts / "loss")
    return found | {"made_up_s": weights.seconds}


def _train_first(params: Config, experiment: str) -> dict[str, Any]:
    """All that `kd train` does. `measured_s` is what depends on the number of rows."""
    from kd.distill import checkpoint
    from kd.distill.adapter import save_adapter
    from kd.distill.train import evaluate, run_key

    run_key(params, experiment)
    student, step, lesson = _beginning(params, experiment)
    work = params.artifacts / "adapters" / experiment
    work.mkdir(parents=True)

    def check() -> None:
        evaluate(student.get_base_model(), lesson.check, None, None, params.distill)

    check()  # what libraries take the first time counts as starting
    start = clock()
    kind = _updates(step, lesson, params)
    test_s = timed(check)
    checkpoint_s = timed(lambda: checkpoint.save(work / "checkpoints", step.descent, []))
    measured_s, used = clock() - start, gpu_use()
    shutil.rmtree(work / "checkpoints")
    save_adapter(student, params, experiment, lesson.matches, work)
    return {
        "base": student.unload(),
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
    from kd.assess.ahead import kernels_for
    from kd.assess.decode import slot_count
    from kd.assess.generate import Ending
    from kd.assess.row import Row
    from kd.distill.adapter import fresh_student
    from kd.models.load import load_tokenizer, model_folder

    clock.leave_out_compiling()
    fingerprint.code_sha256("kd.assess.run")  # a part of its key
    tokenizer = load_tokenizer(model_folder(params.student.model))
    start = clock()
    with made_up_weights(params.student.model, "transformers") as weights:
        student = fresh_student(params, task["experiment"]) if task["experiment"] else _bare(params)
        student = student.merge_and_unload().eval() if task["experiment"] else student
    load_s = clock() - start - weights.seconds
    kernels, used, ways = kernels_for(student), gpu_use(), []
    gpu = student.device.type == "cuda"
    warmed_s = [_warm_up(student, tokenizer, kernels) for _ in range(2)] if gpu else [0.0]
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
            waves.append(_wave(student, rows, params.assess.batch_tokens, longest, ending, kernels))
            waves[-1]["row_s"] = _finishing(rows, ending, params.artifacts)
            used = list(map(max, used, waves[-1].pop("gpu_gib")))
        ways.append({"slots": slots, "full": waves[0], "last": waves[1] if len(waves) > 1 else None})
    return {
        "made_up_s": weights.seconds,
        "load_s": load_s,
        "measured_s": clock() - start + 2 * warmed_s[-1],
        "ways": ways,
        "gpu_gib": used,
    }


def _warm_up(student: Any, tokenizer: Any, kernels: ModuleType | None) -> float:
    """Seconds of some short answers. The first time libraries load what they need, which counts as starting."""
    from kd.assess.generate import Ending
    from kd.assess.row import Row

    rows = [Row(i, [2] * 64, WARM_TOKENS) for i in range(WARM_ROWS)]
    return timed(lambda: _wave(student, rows, WARM_ROWS * 128, 128, Ending(tokenizer, frozenset()), kernels))


def _finishing(rows: list[Row], ending: Any, folder: Path) -> float:
    """Seconds that an answer takes when it has ended: its text, and keeping it."""
    from kd.assess.journal import Journal

    for row in rows:
        row.new += [2] * (row.limit - len(row.new))  # of a batch that was broken off
    (work := folder / "journal").mkdir()
    taken = timed(lambda: Journal(work, 0).add({row.index: ending.response(row) for row in rows}))
    shutil.rmtree(work)
    return taken / len(rows)


def _wave(
    model: Any, rows: list[Row], batch_tokens: int, longest: int, ending: Any, kernels: ModuleType | None
) -> dict[str, Any]:
    """Seconds of rows that begin and end together: the first time, and again when CUDA graphs are recorded."""
    from kd.assess.decode import decode

    budget, limit = (DECODE_GPU_S if model.device.type == "cuda" else DECODE_CPU_S), rows[0].limit
    start, ticks = clock(), []  # when the rows had how many tokens: some more at each look
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
        return timed(lambda: [log(record) for record in records]) / len(records)


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
