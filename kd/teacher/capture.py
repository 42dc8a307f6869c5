"""The teacher reads every training question behind a prompt; its states go into a store.

Protocol `published` (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): prompt + question as plain text, no BOS, no chat
template, one forward per question, every position kept.
"""

from __future__ import annotations

from typing import Any

from kd import models
from kd.config import Config, Teacher
from kd.dataset import Example, read_examples
from kd.errors import UserError
from kd.files import whole_folder
from kd.progress import progress
from kd.prompts import PROMPTS, primed
from kd.teacher import store
from kd.teacher.backends import transformers as backend

TEACHER_BOS = False


def write_head(config: Config) -> None:
    """Keep the teacher's final norm and output head, once for all prompts."""
    teacher = _load(config.teacher)
    with whole_folder(config.artifacts / "teacher" / store.HEAD_FOLDER) as work:
        store.write_head(work, backend.identity(config.teacher), teacher.head())


def capture(config: Config, prompt: str) -> None:
    """Write the store of one prompt: the teacher's states for every training question."""
    folder = config.artifacts / "teacher"
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    head, _ = store.read_head(folder / store.HEAD_FOLDER)
    teacher = _load(config.teacher)
    with whole_folder(folder / prompt) as work:
        writer = store.StoreWriter(
            work, backend.identity(config.teacher), prompt_record(prompt), tokenization(teacher.tokenizer)
        )
        for example in progress(examples, f"teacher, {prompt}", "question"):
            token_ids = teacher_token_ids(teacher.tokenizer, prompt, example)
            writer.add(example.id, token_ids, teacher.states(token_ids))
        writer.finish(head.sha256)


def teacher_token_ids(tokenizer: Any, prompt: str, example: Example) -> list[int]:
    """What the teacher reads for one example, as tokens."""
    return models.encode(tokenizer, primed(prompt, example.question), bos=TEACHER_BOS)


def open_checked(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> store.TeacherStore:
    """The store of one prompt, refused unless it is this teacher's for these examples as `tokenizer` reads them."""
    opened = store.TeacherStore(config.artifacts / "teacher" / prompt)
    expected = {example.id: teacher_token_ids(tokenizer, prompt, example) for example in examples}
    opened.check(backend.identity(config.teacher), prompt_record(prompt), tokenization(tokenizer), expected)
    return opened


def prompt_record(prompt: str) -> store.Prompt:
    """The prompt as a store names it."""
    return store.Prompt(name=prompt, text=PROMPTS[prompt])


def tokenization(tokenizer: Any) -> store.Tokenization:
    """The tokenization as a store names it."""
    return store.Tokenization(bos=TEACHER_BOS, vocabulary_sha256=models.vocabulary_sha256(tokenizer))


def _load(teacher: Teacher) -> backend.TransformersTeacher:
    if teacher.backend != "transformers":
        raise UserError(
            f"teacher.backend: {teacher.backend} is not in this version yet; "
            "`backend: transformers` runs any Llama folder"
        )
    return backend.TransformersTeacher(teacher)
