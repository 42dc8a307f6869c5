"""Assessment logs: one row per test question, the original's columns and what the rules took from the response."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.assess.extract import extract, without_prompt
from kd.assess.review import NO_ANSWER, OpenRow, read_decisions, reviews_file
from kd.assess.rules.number import canonical
from kd.assess.rules.rule import UNDECIDED
from kd.config import Config
from kd.dataset import Example, final_answer
from kd.errors import UserError
from kd.files import read_table

if TYPE_CHECKING:
    from kd.assess.generate import Response

COLUMNS = (
    "question",
    "answer",
    "model_answer",
    "model_output_tokens",
    "model_max_tokens",
    "extracted_answer",
    "rule",
    "correct",
)


@dataclass(frozen=True)
class Score:
    """What a log comes to: per row whether it is right, the 1-based rows that neither a rule nor a person settled
    (they count as wrong), and how many a person decided."""

    right: list[bool]
    undecided: list[int]
    by_hand: int

    @property
    def correct(self) -> int:
        """Rows that are right."""
        return sum(self.right)


def log_text(examples: Sequence[Example], prompts: Sequence[str], responses: Sequence[Response]) -> str:
    """The CSV file of one student's responses to the prompts made of `examples`, in their order."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    extractions = extract(response.text for response in responses)
    for example, prompt, response, found in zip(examples, prompts, responses, extractions, strict=True):
        writer.writerow(
            [
                example.question,
                example.answer,
                prompt + response.text,
                response.tokens,
                response.reached_limit,
                found.answer or NO_ANSWER,
                found.rule,
                is_correct(found.answer, example.answer),
            ]
        )
    return table.getvalue()


def is_correct(answer: str | None, true_answer: str) -> bool:
    """Whether an extracted answer is the number behind the "####" of GSM8K's answer."""
    truth = final_answer(true_answer)
    assert truth is not None, true_answer  # refused when the data was prepared
    return answer == canonical("-" if truth.startswith("-") else "", truth.lstrip("-"))


def log_file(config: Config, experiment: str) -> Path:
    """Where an experiment's log lies."""
    return config.artifacts / "logs" / f"{experiment}.csv"


def read_log(config: Config, experiment: str) -> list[dict[str, str]]:
    """The rows of an experiment's log as text by column, as many as the test set has."""
    path, rows = log_file(config, experiment), config.dataset.test_rows
    if not path.exists():
        raise UserError(f"{path}: no such file; run `kd assess {experiment}`")
    table = read_table(path, COLUMNS)
    if len(table) != rows:
        raise UserError(f"{path}: {len(table)} rows where the test set has {rows}; run `kd assess {experiment}` again")
    return table


def score(config: Config, experiment: str) -> Score:
    """The score of an experiment's log, with what a person decided of it (reviews/<experiment>.csv)."""
    table = read_log(config, experiment)
    right = [row["correct"] == "True" for row in table]
    decisions = read_decisions(reviews_file(experiment))
    undecided, by_hand = [], 0
    for row in _open_rows(config, experiment, table):
        decision = decisions.get(row.sha256)
        if decision is None:
            undecided.append(row.row)
        else:
            by_hand += 1
            right[row.row - 1] = is_correct(decision["answer"], table[row.row - 1]["answer"])
    return Score(right, undecided, by_hand)


def open_rows(config: Config, experiment: str) -> list[OpenRow]:
    """The rows of an experiment's log that no rule settles."""
    return _open_rows(config, experiment, read_log(config, experiment))


def _open_rows(config: Config, experiment: str, table: list[dict[str, str]]) -> list[OpenRow]:
    suffix = config.experiments[experiment].suffix
    return [
        OpenRow(number, row["question"], without_prompt(row["model_answer"], row["question"] + suffix))
        for number, row in enumerate(table, start=1)
        if row["rule"] == UNDECIDED
    ]
