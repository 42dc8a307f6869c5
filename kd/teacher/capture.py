"""The teacher reads every training question behind a prompt; its states go into a store.

Protocol `published` (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): prompt + question as plain text, no BOS, no chat
template, one forward per question, every position kept.

Protocol `aligned`: BOS + prompt + question, then the answer; of its rows those are kept that predict the answer. Its
quirks `bos` and `prompt-offset` keep the rows that a student finds who takes the teacher's positions for its own.

The work is cut into shards of a fixed number of questions. A killed run goes on at its first missing shard, several
processes do a part of the shards each, and either way the finished store has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import models
from kd.config import Config, Distill, Protocol, Quirk
from kd.dataset import Example, read_examples
from kd.distributed import take_gpus, this_process, wait_for_others
from kd.errors import UserError, WorkFailedError
from kd.files import put_in_place, remove_stale, unfinished_folder, whole_folder
from kd.progress import progress
from kd.prompts import PROMPTS, primed
from kd.teacher import backends, store
from kd.teacher.store import Reading, StoreWriter

if TYPE_CHECKING:
    import torch


def write_head(config: Config) -> None:
    """Keep the teacher's final norm and output head, once for all prompts."""
    teacher = backends.load(config.teacher, longest=1)
    with whole_folder(config.artifacts / "teacher" / store.HEAD_FOLDER) as work:
        store.write_head(work, backends.identity(config.teacher), teacher.head())


def capture(config: Config, prompt: str) -> None:
    """Write the store of one prompt: the teacher's states for every training question.

    A store that is whole and right already is left alone. An unfinished one is gone on with, if teacher, prompt, data
    and libraries are those it was begun with.
    """
    process = this_process()
    take_gpus(process)
    target = config.artifacts / "teacher" / prompt
    tokenizer = models.load_tokenizer(models.model_folder(config.teacher.model))
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    head_sha256 = _head_sha256(config)
    if _is_whole(config, prompt, tokenizer, examples):
        print(f"{target}: is there and right; remove it to capture it again", file=sys.stderr)
        return
    wanted = readings(config, prompt, tokenizer, examples)
    model = backends.identity(config.teacher)
    about = (model, prompt_record(prompt), tokenization(tokenizer, config.distill))
    key = _key([*(record.model_dump() for record in about), head_sha256, config.teacher.batch_rows], wanted)
    work = unfinished_folder(target, key)
    writer = StoreWriter(work, *about, batch_rows=config.teacher.batch_rows)
    shards = range(ceil(len(wanted) / writer.shard_examples))
    with _tells_what_is_kept(work, writer, shards):
        _capture_missing(config, prompt, wanted, writer, process.part(len(shards)))
        if process.rank == 0:
            remove_stale(target, key)
            wait_for_others(lambda: len(missing(writer, shards)), f"teacher, {prompt}, waiting for other processes")
            manifest = writer.finish(head_sha256)
            if [example.reading for example in manifest.examples] != wanted:
                raise WorkFailedError(f"{work}: not every question is there once; remove the folder and capture again")
            put_in_place(work, target)


def readings(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> list[Reading]:
    """What the teacher reads for each example."""
    settings = config.distill
    return [teacher_reading(tokenizer, settings.protocol, prompt, example, settings.quirks) for example in examples]


def teacher_reading(
    tokenizer: Any, protocol: Protocol, prompt: str, example: Example, quirks: Sequence[Quirk] = ()
) -> Reading:
    """What the teacher reads for one example, as tokens, and which of its rows are kept.

    Row i is the distribution of token i + 1, so under `aligned` the rows kept are those before each answer token: as
    many as there are answer tokens, also where a quirk takes others.
    """
    bos = _has_bos(protocol, quirks)
    question = models.encode(tokenizer, primed(prompt, example.question), bos=bos)
    if protocol == "published":
        return Reading(example.id, question, (0, len(question)))
    answer = answer_token_ids(tokenizer, example)
    first = len(question) - 1
    if "bos" in quirks:  # counted as if BOS were there
        first += 1
    if "prompt-offset" in quirks:  # counted as if the prompt were not
        first -= len(question) - len(models.encode(tokenizer, example.question, bos=bos))
    return Reading(example.id, question + answer, (first, first + len(answer)))


def answer_token_ids(tokenizer: Any, example: Example) -> list[int]:
    """A line end and the answer, tokenized apart from the question, so that teacher and student read the same ones
    whatever stands before them (a tokenizer may join "?" and the line end)."""
    return models.encode(tokenizer, "\n" + example.target, bos=False)


def open_checked(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> store.TeacherStore:
    """The store of one prompt, refused unless every file of it is right and it is this teacher's for these examples
    as `tokenizer` reads them."""
    opened = store.TeacherStore(config.artifacts / "teacher" / prompt)
    opened.check(
        backends.identity(config.teacher),
        prompt_record(prompt),
        tokenization(tokenizer, config.distill),
        readings(config, prompt, tokenizer, examples),
    )
    opened.verify()
    return opened


def prompt_record(prompt: str) -> store.Prompt:
    """The prompt as a store names it."""
    return store.Prompt(name=prompt, text=PROMPTS[prompt])


def tokenization(tokenizer: Any, settings: Distill) -> store.Tokenization:
    """The tokenization as a store names it."""
    return store.Tokenization(
        bos=_has_bos(settings.protocol, settings.quirks), vocabulary_sha256=models.vocabulary_sha256(tokenizer)
    )


def missing(writer: StoreWriter, shards: range) -> list[int]:
    """Which of `shards` are not there."""
    return [number for number in shards if not writer.has_shard(number)]


def fill(
    teacher: backends.LoadedTeacher,
    wanted: list[Reading],
    writer: StoreWriter,
    todo: list[int],
    batch_rows: int,
    bar: Any,
) -> None:
    """Let the teacher read the questions of the shards in `todo`, and write these."""
    for number in todo:
        group = _group(wanted, number, writer.shard_examples)
        writer.begin_shard(number)
        for reading, rows in zip(group, _states(teacher, group, batch_rows, bar), strict=True):
            writer.add(reading.example_id, reading.token_ids, rows, reading.span)
    writer.flush()


def _capture_missing(config: Config, prompt: str, wanted: list[Reading], writer: StoreWriter, shards: range) -> None:
    """Capture what is missing of `shards`; loads the teacher only if something is."""
    todo = missing(writer, shards)
    if not todo:
        return
    teacher = backends.load(config.teacher, max(len(reading.token_ids) for reading in wanted))
    sizes = {number: len(_group(wanted, number, writer.shard_examples)) for number in shards}
    with progress((), f"teacher, {prompt}", "question", sum(sizes.values())) as bar:
        bar.update(sum(sizes[number] for number in shards if number not in todo))
        fill(teacher, wanted, writer, todo, config.teacher.batch_rows, bar)


def _has_bos(protocol: Protocol, quirks: Sequence[Quirk]) -> bool:
    """Whether the teacher's texts start with BOS."""
    return protocol == "aligned" and "bos" not in quirks


def _group(wanted: list[Reading], number: int, size: int) -> list[Reading]:
    """The questions of one shard."""
    return wanted[number * size : (number + 1) * size]


def _states(teacher: backends.LoadedTeacher, group: list[Reading], batch_rows: int, bar: Any) -> list[torch.Tensor]:
    """The states of one shard's questions, in their order; questions of like length share a forward."""
    order = sorted(range(len(group)), key=lambda i: (-len(group[i].token_ids), i))
    states: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        states.update(zip(batch, teacher.states([group[i].token_ids for i in batch]), strict=True))
        bar.update(len(batch))
    return [states[i] for i in range(len(group))]


def _head_sha256(config: Config) -> str:
    """The checksum of the head that the states belong to, refused if it is another model's."""
    folder, model = config.artifacts / "teacher" / store.HEAD_FOLDER, backends.identity(config.teacher)
    head = store.read_head_manifest(folder)
    if str(head.model) != str(model):
        raise UserError(f"{folder}: the head of {head.model}, not of {model}; run `kd head` again")
    return head.sha256


def _is_whole(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> bool:
    try:
        opened = open_checked(config, prompt, tokenizer, examples)
    except UserError:
        return False
    return opened.manifest.batch_rows == config.teacher.batch_rows


def _key(about: list[Any], wanted: list[Reading]) -> str:
    """A short fingerprint of everything that shapes a store's bytes: what a finished one says, and the device."""
    document = json.dumps([about, _device(), [astuple(reading) for reading in wanted]])
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@contextmanager
def _tells_what_is_kept(work: Path, writer: StoreWriter, shards: range) -> Iterator[None]:
    """Let whoever stops the work, or learns that it failed, know what the next run starts with."""

    def kept() -> str:
        writer.settle()
        there = len(shards) - len(missing(writer, shards))
        return f"{there} of {len(shards)} shards are kept in {work}; the same command goes on from there"

    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None
    except (OSError, RuntimeError) as error:  # a full disk, a failing GPU
        raise WorkFailedError(f"{' '.join(str(error).split())}; {kept()}") from error
