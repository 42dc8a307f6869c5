"""What teacher and student read, as tokens.

Protocol `published` (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): the teacher reads prompt + question as plain text, no
BOS, no chat template; the student reads BOS + question.

Protocol `aligned`: BOS + prompt + question, then the answer; of the teacher's rows those are kept that predict the
answer. Its quirks `bos` and `prompt-offset` keep the rows that a student finds who takes the teacher's positions for
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd.config import Distill, Protocol, Quirk
from kd.data.rows import Example
from kd.models.load import encode
from kd.paper import PROMPTS
from kd.store.records import Reading

STUDENT_BOS = True


def readings(settings: Distill, prompt: str, tokenizer: Any, examples: list[Example]) -> list[Reading]:
    """What the teacher reads for each example."""
    return [teacher_reading(tokenizer, settings.protocol, prompt, example, settings.quirks) for example in examples]


def teacher_reading(
    tokenizer: Any, protocol: Protocol, prompt: str, example: Example, quirks: Sequence[Quirk] = ()
) -> Reading:
    """What the teacher reads for one example, as tokens, and which of its rows are kept.

    Row i is the distribution of token i + 1, so under `aligned` the rows kept are those before each answer token: as
    many as there are answer tokens, also where a quirk takes others.
    """
    bos = has_bos(protocol, quirks)
    question = encode(tokenizer, primed(prompt, example.question), bos=bos)
    if protocol == "published":
        return Reading(example.id, question, (0, len(question)))
    answer = answer_token_ids(tokenizer, example)
    first = len(question) - 1
    if "bos" in quirks:  # counted as if BOS were there
        first += 1
    if "prompt-offset" in quirks:  # counted as if the prompt were not
        first -= len(question) - len(encode(tokenizer, example.question, bos=bos))
    return Reading(example.id, question + answer, (first, first + len(answer)))


def answer_token_ids(tokenizer: Any, example: Example) -> list[int]:
    """A line end and the answer, tokenized apart from the question, so that teacher and student read the same ones
    whatever stands before them (a tokenizer may join "?" and the line end)."""
    return encode(tokenizer, "\n" + example.target, bos=False)


def student_token_ids(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    """What the student reads for a text, and what a published answer is as labels: BOS + text, cut to `limit`."""
    return encode(tokenizer, text, bos=STUDENT_BOS, limit=limit)


def primed(prompt: str, question: str) -> str:
    """What the teacher reads: the prompt's text, then the question."""
    return PROMPTS[prompt] + question


def has_bos(protocol: Protocol, quirks: Sequence[Quirk]) -> bool:
    """Whether the teacher's texts start with BOS."""
    return protocol == "aligned" and "bos" not in quirks
