"""Which student position, which answer token and which teacher row belong together.

Protocol `published` (<experiment>/distill.ipynb), each choice as the original made it:

- the student reads BOS + question and nothing else (`input_ids`);
- its row i, the distribution for question token i + 1, meets token i of BOS + answer: no shift;
- and row i of a teacher store's example, whose tokens start with the prompt and have no BOS;
- all are cut to the shortest;
- which example: see `published_teacher_order`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd import models
from kd.dataset import Example
from kd.errors import UserError

STUDENT_BOS = True


@dataclass(frozen=True)
class Match:
    """One training example: the student reads `input_ids`; its first `len(labels)` rows meet `labels` and, row by
    row, the teacher's rows for `teacher_id` (None without a teacher)."""

    example_id: str
    input_ids: list[int]
    labels: list[int]
    teacher_id: str | None


def student_token_ids(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    """What the student reads for a text, and what an answer is as labels: BOS + text, cut to `limit` tokens."""
    return models.encode(tokenizer, text, bos=STUDENT_BOS, limit=limit)


def published_matches(
    examples: list[Example], tokenizer: Any, max_tokens: int, teacher_lengths: dict[str, int] | None
) -> list[Match]:
    """The training examples in order. `teacher_lengths` gives the stored rows of each example id, in store order."""
    order = published_teacher_order(list(teacher_lengths)) if teacher_lengths else [None] * len(examples)
    matches = []
    for example, teacher_id in zip(examples, order, strict=True):
        input_ids = student_token_ids(tokenizer, example.question, max_tokens)
        labels = student_token_ids(tokenizer, example.target, max_tokens)
        rows = min(len(input_ids), len(labels))
        if teacher_lengths and teacher_id:
            rows = min(rows, teacher_lengths[teacher_id])
        if rows == 0:
            raise UserError(f"{example.id}: no overlapping positions between question, answer and teacher rows")
        matches.append(Match(example.id, input_ids, labels[:rows], teacher_id))
    return matches


def published_teacher_order(ids: list[str]) -> list[str]:
    """The ids whose teacher rows the original's training loop met, in its order.

    It iterated over `safe_open(...).keys()`, which sorts "Question 1", "Question 10", "Question 100", … as text,
    so of 2638 questions only the first met its own rows.
    """
    as_text = sorted(range(len(ids)), key=lambda i: f"Question {i + 1}")
    return [ids[i] for i in as_text]
