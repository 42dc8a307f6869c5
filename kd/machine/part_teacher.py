"""A part of a teacher's stages, done by their own code on a stand-in and measured: `kd head`, `kd teacher`."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

from kd.config import Config
from kd.data.rows import read_examples
from kd.io.files import put_in_place
from kd.machine.lengths import ALL
from kd.machine.measure import clock, gpu_use
from kd.machine.stand_in import made_up_weights
from kd.store.head import HEAD_FOLDER, read_head_manifest
from kd.store.records import ModelIdentity, Reading
from kd.store.writer import StoreWriter
from kd.teacher import backends
from kd.teacher.capture import fill

if TYPE_CHECKING:
    import torch

ROUNDS = 6  # over the questions, by a teacher that is ahead, so that the end of a capture does not count for much
# Who made a store of which nothing is kept: a stand-in's own identity has the checksum of files that are holes.
NOBODY = ModelIdentity(name="random", revision=None, weights=None, dtype="float16", backend="exllamav2", versions={})


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


def head(params: Config, _: dict[str, Any]) -> dict[str, Any]:
    """`kd head`."""
    from kd.teacher.capture import keep_head

    with made_up_weights(params.teacher.model, params.teacher.backend) as weights:
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
    with made_up_weights(params.teacher.model, params.teacher.backend) as weights:
        loaded = backends.load(params.teacher, most)
    longest = [[2 + i % 7 for i in range(most)]] * rows
    # As much memory as any other takes. What libraries take the first time counts as starting.
    (_, _), (_, longest_s) = _alone(loaded, [longest, longest])
    start = clock()
    target = params.artifacts / "teacher" / prompt
    about = (backends.identity(params.teacher), prompt_record(params, prompt), tokenization(tokenizer, params.distill))
    work, beside = (target.with_name(f"{prompt}.{end}") for end in ("work", "beside"))
    work.mkdir(parents=True)
    ahead = {}
    if _is_ahead(params):
        beside.mkdir()
        ahead = _ahead(loaded, wanted, rows, StoreWriter(beside, *about, key=key, batch_rows=rows))
        shutil.rmtree(beside)
    writer = StoreWriter(work, *about, key=key, batch_rows=rows)
    watched = capture_into(loaded, wanted, rows, writer)
    ended = clock()
    writer.finish(read_head_manifest(params.artifacts / "teacher" / HEAD_FOLDER).sha256)
    put_in_place(work, target)
    settled = clock() - ended
    forwards = watched.intervals(ended) or [(rows * most, longest_s)]  # of all questions in one there is none
    found = {"forwards": forwards, "first_s": 0.0, "second_s": 0.0, "keep_s": 0.0} | ahead
    return found | {
        "made_up_s": weights.seconds,
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
