"""What teacher and student read, as tokens.

Protocol `published` (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): the teacher reads prompt + question as plain text, no
BOS, no chat template; the student reads BOS + question.

Protocol `aligned`: BOS + prompt + question, then the answer and the end token; of the teacher's rows those are kept
that predict the answer and its end. Its quirk `no-end` leaves the end token out; `bos` and `prompt-offset` keep the
rows that a student finds who takes the teacher's positions for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd.config import Distill, Protocol, Quirk
from kd.data.rows import Example
from kd.errors import UserError
from kd.models.load import encode
from kd.store.records import Reading

STUDENT_BOS = True


def readings(settings: Distill, prompt: str, tokenizer: Any, examples: list[Example]) -> list[Reading]:
    """What the teacher reads for each example behind the text of a prompt."""
    return [teacher_reading(tokenizer, settings.protocol, prompt, example, settings.quirks) for example in examples]


def teacher_reading(
    tokenizer: Any, protocol: Protocol, prompt: str, example: Example, quirks: Sequence[Quirk] = ()
) -> Reading:
    """What the teacher reads for one example behind `prompt`'s text, as tokens, and which of its rows are kept.

    Row i is the distribution of token i + 1, so under `aligned` the rows kept are those before each answer token: as
    many as there are answer tokens, also where a quirk takes others.
    """
    bos = has_bos(protocol, quirks)
    question = encode(tokenizer, prompt + example.question, bos=bos)
    if protocol == "published":
        return Reading(example.id, question, (0, len(question)))
    answer = answer_token_ids(tokenizer, example, quirks)
    first = len(question) - 1
    if "bos" in quirks:  # counted as if BOS were there
        first += 1
    if "prompt-offset" in quirks:  # counted as if the prompt were not
        first -= len(question) - len(encode(tokenizer, example.question, bos=bos))
    return Reading(example.id, question + answer, (first, first + len(answer)))


def answer_token_ids(tokenizer: Any, example: Example, quirks: Sequence[Quirk] = ()) -> list[int]:
    """A line end, the answer and the end token. They are tokenized apart from the question, so that teacher and student
    read the same ones whatever stands before them (a tokenizer may join "?" and the line end)."""
    answer, end = encode(tokenizer, "\n" + example.target, bos=False), end_token(tokenizer, "aligned", quirks)
    return answer if end is None else [*answer, end]


def end_token(tokenizer: Any, protocol: Protocol, quirks: Sequence[Quirk]) -> int | None:
    """What ends an answer that teacher and student read: the tokenizer's own end-of-sequence token, which is one of
    those that end a response (kd/models/vocabulary.py); None where an answer has no end."""
    if protocol == "published" or "no-end" in quirks:
        return None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer names no eos_token, the end of an answer in `protocol: aligned`; "
            "name it in tokenizer_config.json, or put `no-end` among `distill.quirks`"
        )
    return int(tokenizer.eos_token_id)


def student_token_ids(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    """What the student reads for a text, and what a published answer is as labels: BOS + text, cut to `limit`."""
    return encode(tokenizer, text, bos=STUDENT_BOS, limit=limit)


def has_bos(protocol: Protocol, quirks: Sequence[Quirk]) -> bool:
    """Whether the teacher's texts start with BOS."""
    return protocol == "aligned" and "bos" not in quirks
