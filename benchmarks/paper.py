"""What the paper takes at its own size: capture by a 405B teacher, a student's training and decoding, and their sum.

    python benchmarks/paper.py [--seconds S] [--many]     on one GPU or more; writes benchmarks/results/paper.json
    python benchmarks/paper.py --shape 8b --layers 8      a trial of two minutes; writes nothing

The teacher is an EXL2 model of Llama 3.1 405B's shape, 6 bits, whose random weights are made on the GPUs as exllamav2
asks for them (kd/machine/random_exl2.py). It reads random tokens in GSM8K's lengths: first as the library does it
(`load_autosplit`, then its own `forward`, one GPU at a time), then as `kd teacher` does it, into a store on the disk,
with 1, 4 and 8 questions a forward (`--many`: 32 too), all in this one run. A capture's time a question is that from
one of its results to another, so that filling the pipeline, which happens once in 2638 questions, is not counted.
Training and decoding are those of benchmarks/train.py and assess.py, at the same time where there are two GPUs.

Each part is a process of its own, which finds nothing on the GPUs that another left there. Of a part that fails it is
said how, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import assess
import torch
import train
from result import write_result
from teacher import ABOUT, GIB, autosplit, make_questions, peaks, resident
from transformers import LlamaForCausalLM

from kd.assess.ahead import kernels_for
from kd.config import FolderModel, Teacher
from kd.machine.measure import gpu_use
from kd.machine.part_teacher import NOBODY, capture_into
from kd.machine.random_exl2 import random_weights, write_folder
from kd.machine.shapes import LLAMA_8B, LLAMA_70B, LLAMA_405B
from kd.machine.stand_in import save_tokenizer
from kd.models.load import pad_right
from kd.store.head import HEAD_FOLDER, TeacherHead, read_head_manifest, write_head
from kd.store.records import Reading
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.backends.exllamav2 import UNORDERED_TOKENS, Stage

SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "405b": LLAMA_405B}
ROWS = (1, 4, 8)
MANY_ROWS = 32  # more than load_autosplit leaves room for
LONGEST = 256
KEPT = 6  # forwards whose states are compared
ROUNDS = 4
# The paper's work (profiles/paper.yaml).
PROMPTS, QUESTIONS, STUDENTS, STEPS = 4, 2638, 5, 5276
ANSWERS, TOKENS, TABLE_ROWS = 1319, 350, 7
REST_S = 240  # the stages without a GPU and all starts of Python: what the miniature's whole chain takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="405b")
    parser.add_argument("--layers", type=int, help="only so many of its layers, for a trial")
    parser.add_argument("--seconds", type=float, default=12, help="about how long each way captures (default 12)")
    parser.add_argument("--many", action="store_true", help=f"{MANY_ROWS} questions a forward as well")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = shape._replace(layers=options.layers or shape.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_folder(folder / "model", shape)
        save_tokenizer(folder / "model", shape.vocabulary)
        measured: dict[str, Any] = {"shape": shape._asdict(), "weights_gb": size / 1e9}
        parts: dict[str, Callable[[], Any]] = {
            "library": partial(library_capture, folder, options.seconds),
            "pipelined": partial(pipelined_capture, folder, options.seconds, 8),
            "head": partial(keep_head, folder),
        }
        if options.many:
            parts["many"] = partial(pipelined_capture, folder, options.seconds, MANY_ROWS)
        for part, work in parts.items():
            measured[part] = result(begin(work, all_gpus()), part)
        measured |= students()
    if options.layers or options.shape != "405b":
        print(json.dumps(measured, indent=1))
        return
    write_result("paper", figures(measured), measured)


def all_gpus() -> list[int]:
    """The numbers of the GPUs, without making a context on them."""
    return list(range(torch.cuda.device_count()))


def begin(work: Callable[[], Any], gpus: list[int]) -> Future[Any]:
    """Do `work` in a process of its own that sees these GPUs alone, from its first moment."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else list(map(str, all_gpus()))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] for gpu in gpus)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = pool.submit(timed, work, time.time())
    pool.shutdown(wait=False)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    return future


def timed(work: Callable[[], Any], since: float) -> Any:
    """What `work` finds, with the seconds that the process took to begin with it."""
    started = time.time() - since
    return work() | {"start_s": started}


def result(future: Future[Any], part: str) -> dict[str, Any]:
    """What a part has found, or how it failed; either is printed at once."""
    error = future.exception()
    if error is None:
        found: dict[str, Any] = future.result()
    else:
        traceback.print_exception(error)
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]}
    print(f"\n{part}: {json.dumps(found)}", flush=True)
    return found


def library_capture(folder: Path, seconds: float) -> dict[str, Any]:
    """The library's own way, of which the first states are kept."""
    start = time.perf_counter()
    with random_weights():
        model = autosplit(folder / "model", max(ROWS), LONGEST)
    synchronize()
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "loaded_gib": used()}
    for rows in ROWS:
        kept, times = [], []
        for number, batch in enumerate(batches(rows)):
            start = time.perf_counter()
            ids = pad_right(batch, UNORDERED_TOKENS + 1)
            _, states = model.forward(ids, last_id_only=True, return_last_state=True)
            synchronize()
            times.append((time.perf_counter() - start) * 1000 / rows)
            if number < KEPT:
                kept.append(states.cpu())
            elif sum(times) * rows > seconds * 1000:
                break
        torch.save(kept, folder / f"states-{rows}.pt")
        found[str(rows)] = spread(times[2:])  # the first warm up
    return found | {"gib": used()}


def pipelined_capture(folder: Path, seconds: float, most: int) -> dict[str, Any]:
    """This package's way, with up to `most` questions a forward: whether the states are the library's, and times."""
    teacher = Teacher(
        backend="exllamav2",
        model=FolderModel(source="folder", path=str(folder / "model")),
        dtype="float16",
        batch_rows=most,
    )
    start = time.perf_counter()
    with random_weights():
        loaded = backends.load(teacher, LONGEST)
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "loaded_gib": used()}
    found["resident_gib"] = {"loaded": resident() / GIB}
    for rows in ROWS if most == max(ROWS) else (most,):
        if most == max(ROWS):
            found[f"same bits, {rows}"] = same_bits(loaded, folder, rows)
        with peaks() as peak:
            ticks, busy = captured(loaded, folder, rows, seconds)
        found[str(rows)] = rates(ticks, rows) | {"busy": busy, "host_gib_beside": peak["host_gib"]}
        print(f"{rows} a forward: {found[str(rows)]}", flush=True)
    return found | {"gib": used()}


def same_bits(loaded: Any, folder: Path, rows: int) -> bool:
    """Whether the states are those that the library made of the same batches."""
    own = torch.load(folder / f"states-{rows}.pt", weights_only=True)
    some = [batch for batch, _ in zip(batches(rows), own, strict=False)]
    pairs = zip(loaded.states(some), own, strict=True)
    return all(
        torch.equal(mine, theirs[: len(mine)])
        for batch, states in pairs
        for mine, theirs in zip(batch, states, strict=True)
    )


class Clock:
    """In the place of a progress bar: when how many questions were done."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, int]] = []

    def update(self, count: int) -> None:
        self.ticks.append((time.perf_counter(), count))


def captured(loaded: Any, folder: Path, rows: int, seconds: float) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """Capture into a store for about so long; when its results came, and the share of the time each stage had work."""
    busy: dict[str, float] = {}
    call = Stage.__call__

    def watched(self: Stage, inputs: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        states = call(self, inputs)
        name = "embedding" if self.device < 0 else f"GPU {self.device}"
        busy[name] = busy.get(name, 0) + time.perf_counter() - start
        return states

    Stage.__call__ = watched  # type: ignore[method-assign]
    try:
        first, count = Clock(), 2 * max(16, 2 * rows)
        run_fill(loaded, questions(count), folder / f"trial-{rows}", rows, first)
        pace = (first.ticks[-1][0] - first.ticks[0][0]) / (count - rows)
        busy.clear()
        count, clock, start = max(count, round(seconds / pace)), Clock(), time.perf_counter()
        run_fill(loaded, questions(count), folder / f"store-{rows}", rows, clock)
    finally:
        Stage.__call__ = call  # type: ignore[method-assign]
    whole = time.perf_counter() - start
    return clock.ticks, {name: seconds / whole for name, seconds in busy.items()} | {"seconds": whole}


def run_fill(loaded: Any, wanted: list[Reading], folder: Path, rows: int, clock: Clock) -> None:
    """A whole store on the disk."""
    folder.mkdir()
    writer = StoreWriter(folder, NOBODY, *ABOUT, key="", batch_rows=rows)
    capture_into(loaded, wanted, rows, writer, clock)
    writer.finish(None)


def rates(ticks: list[tuple[float, int]], rows: int) -> dict[str, Any]:
    """Milliseconds a question, from result to result, in rounds of like many forwards."""
    bounds = [round(i * (len(ticks) - 1) / ROUNDS) for i in range(ROUNDS + 1)]
    times = []
    for first, last in pairwise(bounds):
        done = sum(count for _, count in ticks[first + 1 : last + 1])
        if done:
            times.append((ticks[last][0] - ticks[first][0]) * 1000 / done)
    return spread(times) | {"questions": sum(count for _, count in ticks), "forwards": len(ticks), "rows": rows}


def spread(times: list[float]) -> dict[str, Any]:
    return {"ms": statistics.median(times), "least": min(times), "most": max(times), "all": times}


def keep_head(folder: Path) -> dict[str, Any]:
    """What `kd head` does: load norm and head, and write them."""
    teacher = Teacher(
        backend="exllamav2", model=FolderModel(source="folder", path=str(folder / "model")), dtype="float16"
    )
    target = folder / HEAD_FOLDER
    target.mkdir()
    before = resident()
    with peaks() as peak:
        start = time.perf_counter()
        with random_weights():
            head = backends.read_head(teacher)
        loaded = time.perf_counter() - start
        write_head(target, NOBODY, head)
    whole = time.perf_counter() - start
    return {
        "load_s": loaded,
        "whole_s": whole,
        "gb": read_head_manifest(target).vocabulary_size * read_head_manifest(target).hidden_size * 2 / 1e9,
        "host_gib_beside": peak["host_gib"],
        "resident_gib": before / GIB,
        "gib": used(),
    }


def students() -> dict[str, Any]:
    """Training and decoding at 8B shape: at the same time, each on a GPU, where there are two."""
    gpus = all_gpus()
    if len(gpus) == 1:
        return {
            "training": result(begin(train_student, gpus), "training"),
            "decoding": result(begin(decode_answers, gpus), "decoding"),
        }
    training, decoding = begin(train_student, gpus[:1]), begin(decode_answers, gpus[1:2])
    return {"training": result(training, "training"), "decoding": result(decoding, "decoding")}


def train_student() -> dict[str, Any]:
    """Milliseconds of a training step as the paper has it, graphs recorded before."""
    sizes = train.shape(tiny=False)
    torch.manual_seed(0)
    start = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        base = LlamaForCausalLM(sizes.student).eval()
        weight = torch.empty(sizes.student.vocab_size, sizes.teacher_hidden).normal_(std=0.01)
        head = TeacherHead(torch.ones(sizes.teacher_hidden), weight, 1e-5)
    torch.set_default_dtype(torch.float32)
    made = time.perf_counter() - start
    matches, states = train.make_examples(sizes.student.vocab_size, sizes.teacher_hidden)
    settings = train.PAPER.distill.model_copy(update={"epochs": 3})
    start = time.perf_counter()
    run = train.with_fresh_adapter(base, 0.1, train.our_run(matches, states.get, head, settings))
    whole = time.perf_counter() - start
    return {
        "made_s": made,
        "ms": statistics.median(run.times),
        "mean_ms": statistics.fmean(run.times),
        "whole_s": whole,
        "recording_s": whole - sum(run.times) / 1000,  # the first epoch: kernels compiled, graphs captured
        "peak_gib": run.peak / GIB,
    }


def decode_answers() -> dict[str, Any]:
    """Tokens a second of all answers, each up to the limit; kernels compiled and graphs captured on the way."""
    start = time.perf_counter()
    model = assess.random_llama(assess.LLAMA_8B, torch.bfloat16, "cuda")
    made = time.perf_counter() - start
    draw = random.Random(1)
    vocabulary = model.config.vocab_size
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(45, 180))] for _ in range(ANSWERS)]
    batch_tokens, kernels = train.PAPER.assess.batch_tokens, kernels_for(model)
    rate = assess.batched_rate(model, prompts, [TOKENS] * ANSWERS, batch_tokens, kernels)
    return {"made_s": made, "tokens_per_s": rate, "peak_gib": torch.cuda.max_memory_allocated() / GIB}


def figures(measured: dict[str, Any]) -> dict[str, float]:
    """The figures that are asked for; those of a part that failed are left out."""
    library, ours = measured["library"], measured["pipelined"]
    found: dict[str, float] = {}
    if "1" in ours:
        found["exact_ms_per_question"] = ours["1"]["ms"]
        found["gpu_gib_most"] = max(ours["gib"])
    if "1" in ours and "1" in library:
        found["pipelined_speedup"] = library["1"]["ms"] / ours["1"]["ms"]
    try:
        found |= {f"paper_hours_{name}": hours(measured, rows) for name, rows in (("exact", 1), ("batched", 8))}
    except KeyError as error:
        print(f"no sum: a part of it failed ({error})", file=sys.stderr)
    return found


def hours(measured: dict[str, Any], rows: int) -> float:
    """The whole paper, with so many questions a forward: every process' start and loading, and all that it does.

    Students and assessments run side by side, one on each GPU. `measured` is told the terms.
    """
    head, ours = measured["head"], measured["pipelined"]
    training, decoding = measured["training"], measured["decoding"]
    gpus = len(ours["gib"])
    terms = {
        "head": head["start_s"] + head["whole_s"],
        "loading the teacher": PROMPTS * (ours["start_s"] + ours["load_s"]),
        "capture": PROMPTS * QUESTIONS * ours[str(rows)]["ms"] / 1000,
        "training": ceil(STUDENTS / gpus)
        * (training["start_s"] + training["made_s"] + training["recording_s"] + STEPS * training["mean_ms"] / 1000),
        "assessment": ceil(TABLE_ROWS / gpus)
        * (decoding["start_s"] + decoding["made_s"] + ANSWERS * TOKENS / decoding["tokens_per_s"]),
        "the rest": REST_S,
    }
    measured[f"seconds, {rows} a forward"] = terms
    return float(sum(terms.values()) / 3600)


def questions(count: int) -> list[Reading]:
    """Some questions."""
    return make_questions(count, LLAMA_405B.vocabulary)


def batches(rows: int) -> Iterator[list[list[int]]]:
    """Questions for the library, those of like length together as in a shard."""
    some = questions(1024)
    for start in range(0, len(some), max(16, 2 * rows)):
        shard = sorted(some[start : start + max(16, 2 * rows)], key=lambda one: -len(one.token_ids))
        for i in range(0, len(shard), rows):
            yield [one.token_ids for one in shard[i : i + rows]]


def used() -> list[float]:
    """GiB in use on each GPU, this process' and all others'."""
    return [round(gib, 2) for gib in gpu_use()]


def synchronize() -> None:
    for gpu in all_gpus():
        torch.cuda.synchronize(gpu)


if __name__ == "__main__":
    main()
