"""The teacher reads every training question behind a prompt; its states go into a store.

The work is cut into shards of a fixed number of questions. A killed run goes on at its first missing shard, several
processes do a part of the shards each, and either way the finished store has the same bytes.
"""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import fingerprint
from kd.config import Config, Distill
from kd.data.rows import Example, read_examples
from kd.errors import UserError, WorkFailedError
from kd.io.distributed import take_gpus, this_process, wait_for_others
from kd.io.files import put_in_place, remove_stale, unfinished_folder, whole_folder
from kd.io.progress import progress
from kd.io.stopping import what_is_kept
from kd.models.load import load_tokenizer, model_folder, refuse_two_vocabularies, vocabulary_sha256
from kd.protocol.reading import end_token, has_bos, readings
from kd.store.head import HEAD_FOLDER, read_head_manifest, write_head
from kd.store.reader import TeacherStore
from kd.store.records import MANIFEST, Prompt, Reading, Tokenization
from kd.store.writer import StoreWriter
from kd.teacher import backends

if TYPE_CHECKING:
    import torch


def keep_head(config: Config) -> None:
    """Keep the teacher's final norm and output head, once for all prompts."""
    refuse_two_vocabularies(config.teacher.model, config.student.model)
    head = backends.read_head(config.teacher)
    with whole_folder(config.artifacts / "teacher" / HEAD_FOLDER) as work:
        write_head(work, backends.identity(config.teacher), head)


def capture(config: Config, prompt: str) -> bool:
    """Write the store of one prompt: the teacher's states for every training question; returns whether it had to.

    A store that is there and right (kd/fingerprint.py) is left alone, and an unfinished one gone on with, if all that
    shapes it is what it was begun with.
    """
    process = this_process()
    take_gpus(process)
    target = config.artifacts / "teacher" / prompt
    tokenizer = load_tokenizer(model_folder(config.teacher.model))
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    head_sha256 = _head_sha256(config)
    key = capture_key(config, prompt)
    with unfinished_folder(target, key, process) as work:
        if _is_right(config, prompt, tokenizer, examples, key):
            print(f"{target}: is there and right; remove it to capture it again", file=sys.stderr)
            return False
        wanted = readings(config.distill, config.prompts[prompt], tokenizer, examples)
        teacher, tokens = backends.identity(config.teacher), tokenization(tokenizer, config.distill)
        about = (teacher, prompt_record(config, prompt), tokens)
        writer = StoreWriter(work, *about, key=key, batch_rows=config.teacher.batch_rows)
        shards = range(ceil(len(wanted) / writer.shard_examples))
        with what_is_kept(work, partial(_kept, writer, shards, work)):
            _capture_missing(config, prompt, wanted, writer, process.part(len(shards)))
            if process.rank == 0:
                remove_stale(work)
                wait_for_others(lambda: len(missing(writer, shards)), f"teacher, {prompt}, waiting for other processes")
                manifest = writer.finish(head_sha256)
                if [example.reading for example in manifest.examples] != wanted:
                    raise WorkFailedError(f"{work}: not every question is there once; remove it and capture again")
                put_in_place(work, target)
    return True


def capture_key(config: Config, prompt: str) -> str:
    """The key of all that shapes a store's bytes."""
    settings, folder = config.distill, config.artifacts
    return fingerprint.key(
        __name__,
        {
            "teacher": config.teacher.model_dump(),
            "prompt": prompt_record(config, prompt).model_dump(),
            "reading": [settings.protocol, settings.quirks],
        },
        files=[folder / "data" / "train.jsonl", folder / "teacher" / HEAD_FOLDER / MANIFEST],
        models={"teacher": model_folder(config.teacher.model)},
        libraries=(*backends.LIBRARIES[config.teacher.backend], "tokenizers"),
        device=fingerprint.device_name(),
    )


def open_checked(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> TeacherStore:
    """The store of one prompt, refused unless every file of it is right and it is this teacher's for these examples
    as `tokenizer` reads them."""
    opened = TeacherStore(config.artifacts / "teacher" / prompt)
    opened.check(
        backends.identity(config.teacher),
        prompt_record(config, prompt),
        tokenization(tokenizer, config.distill),
        readings(config.distill, config.prompts[prompt], tokenizer, examples),
    )
    opened.verify()
    return opened


def prompt_record(config: Config, prompt: str) -> Prompt:
    """The prompt as a store names it."""
    return Prompt(name=prompt, text=config.prompts[prompt])


def tokenization(tokenizer: Any, settings: Distill) -> Tokenization:
    """The tokenization as a store names it."""
    return Tokenization(
        bos=has_bos(settings.protocol, settings.quirks),
        end=end_token(tokenizer, settings.protocol, settings.quirks),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
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
    """Let the teacher read the questions of the shards in `todo`, and write these one after another.

    The teacher is given the batches of all shards as one stream, so that it need not wait for a shard to be written.
    """
    batches = {number: _batches(wanted, number, writer.shard_examples, batch_rows) for number in todo}
    stream = teacher.states([wanted[i].token_ids for i in batch] for number in todo for batch in batches[number])
    with closing(stream):
        for number in todo:
            states: dict[int, torch.Tensor] = {}
            for batch in batches[number]:
                states.update(zip(batch, next(stream), strict=True))
                bar.update(len(batch))
            writer.begin_shard(number)
            for i in sorted(states):
                writer.add(wanted[i].example_id, wanted[i].token_ids, states[i], wanted[i].span)
    writer.flush()


def _capture_missing(config: Config, prompt: str, wanted: list[Reading], writer: StoreWriter, shards: range) -> None:
    """Capture what is missing of `shards`; loads the teacher only if something is."""
    todo = missing(writer, shards)
    if not todo:
        return
    teacher = backends.load(config.teacher, max(len(reading.token_ids) for reading in wanted))
    sizes = {number: len(_shard(wanted, number, writer.shard_examples)) for number in shards}
    with progress((), f"teacher, {prompt}", "question", sum(sizes.values())) as bar:
        bar.update(sum(sizes[number] for number in shards if number not in todo))
        fill(teacher, wanted, writer, todo, config.teacher.batch_rows, bar)


def _shard(wanted: list[Reading], number: int, size: int) -> range:
    """Which questions a shard has."""
    return range(number * size, min((number + 1) * size, len(wanted)))


def _batches(wanted: list[Reading], number: int, size: int, batch_rows: int) -> list[list[int]]:
    """Which of a shard's questions share a forward: those of like length."""
    order = sorted(_shard(wanted, number, size), key=lambda i: (-len(wanted[i].token_ids), i))
    return [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]


def _head_sha256(config: Config) -> str:
    """The checksum of the head that the states belong to, refused if it is another model's."""
    folder, model = config.artifacts / "teacher" / HEAD_FOLDER, backends.identity(config.teacher)
    head = read_head_manifest(folder)
    if head.model.differs(model):
        raise UserError(f"{folder}: the head of {head.model}, not of {model}; run `kd head` again")
    return head.sha256


def _is_right(config: Config, prompt: str, tokenizer: Any, examples: list[Example], key: str) -> bool:
    try:
        opened = open_checked(config, prompt, tokenizer, examples)
    except UserError:
        return False
    return opened.manifest.key == key


def _kept(writer: StoreWriter, shards: range, work: Path) -> str:
    """What the next run starts with."""
    writer.settle()
    there = len(shards) - len(missing(writer, shards))
    return f"{there} of {len(shards)} shards are kept in {work}; the same command goes on from there"
