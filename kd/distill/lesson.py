"""What a student learns from: the data and the teacher's store, verified, and matched by the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd.config import Config
from kd.data.rows import read_examples
from kd.distill.step import States
from kd.errors import UserError
from kd.models.check import check_folder
from kd.models.load import load_tokenizer, model_folder, refuse_two_vocabularies
from kd.protocol.alignment import Match, Matches, match_examples
from kd.store.head import Head
from kd.store.reader import TeacherStore
from kd.teacher.capture import open_checked


@dataclass(frozen=True)
class Lesson:
    """What one student learns from: matched examples, the teacher's store (None for labels alone), and under
    `published` the test rows, matched as its training is, for the original's check."""

    matches: Matches
    store: TeacherStore | None
    check: list[Match]

    @property
    def head(self) -> Head | None:
        """What makes logits of the teacher's rows."""
        return self.store.head if self.store else None

    @property
    def states(self) -> States | None:
        """The teacher's rows by example id."""
        return self.store.rows if self.store else None


def prepare_lesson(config: Config, prompt: str | None) -> Lesson:
    """Read the data and the store of the teacher behind `prompt` (None: no teacher), verified, and match them by the
    protocol. Whatever is wrong with them, or
    with what params want of the student, is said here, before weights are loaded."""
    settings = config.distill
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    folder = model_folder(config.student.model)
    student = check_folder(folder, "transformers").settings
    tokenizer = load_tokenizer(folder)
    if prompt is not None:
        refuse_two_vocabularies(config.teacher.model, config.student.model)
    store = None if prompt is None else open_checked(config, prompt, tokenizer, examples)
    if store:
        _refuse_other_logits(store, student.vocab_size)
    stored = [example.reading for example in store.manifest.examples] if store else None
    matches = match_examples(settings.protocol, examples, tokenizer, settings.max_tokens, stored, settings.quirks)
    return Lesson(matches, store, _check(config, tokenizer))


def _refuse_other_logits(store: TeacherStore, size: int) -> None:
    """Refuse a store of a teacher that is not on this machine and has another vocabulary."""
    if store.vocabulary_size != size:
        raise UserError(
            f"{store.folder}: the teacher has {store.vocabulary_size} logits, the student {size}; "
            "choose a teacher and a student with one vocabulary"
        )


def _check(config: Config, tokenizer: Any) -> list[Match]:
    if config.distill.protocol != "published":
        return []
    tests = read_examples(config.artifacts / "data" / "test.jsonl")
    return match_examples("published", tests, tokenizer, config.distill.max_tokens, None).kept
