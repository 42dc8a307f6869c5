"""Which student position, which label and which teacher row belong together.

Row i of a model is its distribution of token i + 1, given the tokens up to i. docs/protocol.md shows both protocols
token by token.

Protocol `published` (<experiment>/distill.ipynb), each choice as the original made it:

- the student reads BOS + question and nothing else;
- its row i, the distribution for question token i + 1, meets token i of BOS + answer: no shift;
- and row i of a teacher store's example, whose tokens start with the prompt and have no BOS;
- all are cut to the shortest;
- which example: see `published_teacher_order`.

Protocol `aligned`: the student reads BOS + question + line end + answer + end token; the rows before each answer token
meet that token and the teacher's row before the same token. The line end counts as the answer's first token, the end
token as its last. Its `quirks` put single choices of the published protocol back: `teacher-order` and `label-shift`
here, `no-end`, `bos` and `prompt-offset` in what is read and in the rows captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd.config import Protocol, Quirk
from kd.data.rows import Example
from kd.errors import UserError
from kd.protocol.order import published_teacher_order
from kd.protocol.reading import answer_token_ids, student_token_ids
from kd.store.records import Reading


@dataclass(frozen=True)
class Match:
    """One training example: the student reads `input_ids`; its rows from `first_row` on meet `labels` and, one by
    one, the stored rows of the teacher for `teacher_id` (None without a teacher)."""

    example_id: str
    input_ids: list[int]
    first_row: int
    labels: list[int]
    teacher_id: str | None


@dataclass(frozen=True)
class Matches:
    """The examples to train on, in order; `cut` were longer than the limit and lost their ends, and of `skipped`
    nothing was left to train on."""

    kept: list[Match]
    cut: list[str]
    skipped: list[str]


def match_examples(
    protocol: Protocol,
    examples: list[Example],
    tokenizer: Any,
    max_tokens: int,
    stored: list[Reading] | None,
    quirks: Sequence[Quirk] = (),
) -> Matches:
    """The training examples in order, matched with the teacher's `stored` ones (None trains on labels alone).

    Under `published` an example that overlaps with nothing is an error, because leaving it out would change which
    teacher rows the others meet.
    """
    as_text = protocol == "published" or "teacher-order" in quirks
    matches, cut = [], []
    for example, teacher in zip(examples, _teachers(as_text, examples, stored), strict=True):
        if protocol == "published":
            match, was_cut = _published(example, teacher, tokenizer, max_tokens)
        else:
            match, was_cut = _aligned(example, teacher, tokenizer, max_tokens, quirks)
        matches.append(match)
        cut += [example.id] if was_cut else []
    skipped = [match.example_id for match in matches if not match.labels]
    if skipped and (protocol == "published" or len(skipped) == len(matches)):
        raise UserError(
            f"{skipped[0]}: no overlapping positions between question, answer and teacher rows; "
            "raise `distill.max_tokens` or remove the row"
        )
    return Matches([match for match in matches if match.labels], cut, skipped)


def _teachers(as_text: bool, examples: list[Example], stored: list[Reading] | None) -> list[Reading] | list[None]:
    """The stored example that each example meets: in the original's order, `as_text`, or the one with its own id."""
    if stored is None:
        return [None] * len(examples)
    by_id = {teacher.example_id: teacher for teacher in stored}
    if as_text:
        return [by_id[i] for i in published_teacher_order(list(by_id))]
    return [by_id[example.id] for example in examples]


def _published(example: Example, teacher: Reading | None, tokenizer: Any, max_tokens: int) -> tuple[Match, bool]:
    question = student_token_ids(tokenizer, example.question)
    answer = student_token_ids(tokenizer, example.target)
    rows = min(len(question), len(answer), max_tokens, _rows(teacher) if teacher else max_tokens)
    match = Match(example.id, question[:max_tokens], 0, answer[:rows], teacher.example_id if teacher else None)
    return match, max(len(question), len(answer)) > max_tokens


def _aligned(
    example: Example, teacher: Reading | None, tokenizer: Any, max_tokens: int, quirks: Sequence[Quirk]
) -> tuple[Match, bool]:
    question = student_token_ids(tokenizer, example.question)
    answer = answer_token_ids(tokenizer, example, quirks)
    if teacher and teacher.example_id == example.id:  # else the order is the original's, and nothing is to agree
        read = teacher.token_ids[-len(answer) :]
        if read != answer:
            raise UserError(
                f"{example.id}: teacher and student read other tokens as the answer (teacher {read[:8]} …, student "
                f"{answer[:8]} …); capture the prompt again with the student's tokenizer"
            )
    room = max(0, max_tokens - len(question))
    rows = min(len(answer), room, _rows(teacher) if teacher else room)
    tokens, first = question + answer, len(question) - 1
    # Row i predicts token i + 1; unshifted, it meets the token it has just read.
    labels = tokens[first : first + rows] if "label-shift" in quirks else answer[:rows]
    match = Match(example.id, tokens[:max_tokens], first, labels, teacher.example_id if teacher else None)
    return match, room < len(answer)


def _rows(teacher: Reading) -> int:
    start, stop = teacher.span
    return stop - start
