"""The teacher reads every training question behind a prompt; its states go into a store.

Protocol `published` (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): prompt + question as plain text, no BOS, no chat
template, one forward per question, every position kept.

Protocol `aligned`: BOS + prompt + question, then the answer; of its rows those are kept that predict the answer.
"""

from __future__ import annotations

from typing import Any

from kd import models
from kd.config import Config, Protocol, Teacher
from kd.dataset import Example, read_examples
from kd.errors import UserError
from kd.files import whole_folder
from kd.progress import progress
from kd.prompts import PROMPTS, primed
from kd.teacher import store
from kd.teacher.backends import transformers as backend


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
            work,
            backend.identity(config.teacher),
            prompt_record(prompt),
            tokenization(teacher.tokenizer, config.distill.protocol),
        )
        for example in progress(examples, f"teacher, {prompt}", "question"):
            token_ids, span = teacher_reading(teacher.tokenizer, config.distill.protocol, prompt, example)
            writer.add(example.id, token_ids, teacher.states(token_ids)[slice(*span)], span)
        writer.finish(head.sha256)


def teacher_reading(
    tokenizer: Any, protocol: Protocol, prompt: str, example: Example
) -> tuple[list[int], tuple[int, int]]:
    """What the teacher reads for one example, as tokens, and which of its rows are kept: [start, stop).

    Row i is the distribution of token i + 1, so under `aligned` the rows kept are those before each answer token.
    """
    question = models.encode(tokenizer, primed(prompt, example.question), bos=protocol == "aligned")
    if protocol == "published":
        return question, (0, len(question))
    answer = answer_token_ids(tokenizer, example)
    return question + answer, (len(question) - 1, len(question) + len(answer) - 1)


def answer_token_ids(tokenizer: Any, example: Example) -> list[int]:
    """A line end and the answer, tokenized apart from the question, so that teacher and student read the same ones
    whatever stands before them (a tokenizer may join "?" and the line end)."""
    return models.encode(tokenizer, "\n" + example.target, bos=False)


def open_checked(config: Config, prompt: str, tokenizer: Any, examples: list[Example]) -> store.TeacherStore:
    """The store of one prompt, refused unless it is this teacher's for these examples as `tokenizer` reads them."""
    opened = store.TeacherStore(config.artifacts / "teacher" / prompt)
    protocol = config.distill.protocol
    expected = {example.id: teacher_reading(tokenizer, protocol, prompt, example) for example in examples}
    opened.check(backend.identity(config.teacher), prompt_record(prompt), tokenization(tokenizer, protocol), expected)
    return opened


def prompt_record(prompt: str) -> store.Prompt:
    """The prompt as a store names it."""
    return store.Prompt(name=prompt, text=PROMPTS[prompt])


def tokenization(tokenizer: Any, protocol: Protocol) -> store.Tokenization:
    """The tokenization as a store names it."""
    return store.Tokenization(bos=protocol == "aligned", vocabulary_sha256=models.vocabulary_sha256(tokenizer))


def _load(teacher: Teacher) -> backend.TransformersTeacher:
    if teacher.backend != "transformers":
        raise UserError(
            f"teacher.backend: {teacher.backend} is not in this version yet; "
            "`backend: transformers` runs any Llama folder"
        )
    return backend.TransformersTeacher(teacher)
