"""The experiment's rows, as `kd prepare` wrote them: what every later stage reads of the data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from kd.data.number import given
from kd.errors import UserError
from kd.io.files import json_lines
from kd.io.text import refuse_half_characters

MARK = "####"  # before the number that a GSM8K answer ends in


@dataclass(frozen=True)
class Example:
    """One GSM8K row.

    `id` is its split and 1-based position ("train-00017"), `answer` the main answer that ends in "#### n", and
    `target` the answer students are trained on: the socratic one or, with `answers: main`, the same as `answer`.
    """

    id: str
    question: str
    answer: str
    target: str


KEYS = {field.name for field in fields(Example)}


def final_answer(answer: str) -> str | None:
    """The number that stands alone behind the last "####", in canonical spelling; None where there is none."""
    _, mark, behind = answer.rpartition(MARK)
    return given(behind) if mark else None


def read_examples(path: Path) -> list[Example]:
    """The rows of a prepared `train.jsonl` or `test.jsonl`, in order."""
    return [_example(path, line, row) for line, row in json_lines(path, "run `kd prepare`")]


def _example(path: Path, line: int, row: object) -> Example:
    if not isinstance(row, dict) or row.keys() != KEYS or not all(isinstance(row[key], str) for key in KEYS):
        raise UserError(f"{path} line {line}: not a prepared row; run `kd prepare` again")
    refuse_half_characters(row, f"{path} line {line}")
    if final_answer(row["answer"]) is None:
        raise UserError(f"{path} line {line}: no number behind `####` in its answer; run `kd prepare` again")
    return Example(**row)
