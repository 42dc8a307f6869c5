"""Assessment logs: one row per test question, the original's columns and what the rules took from the response."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.config import Config
from kd.data.rows import Example, final_answer
from kd.errors import UserError
from kd.io.files import read_table
from kd.scoring.extract import extract, without_prompt
from kd.scoring.review import NO_ANSWER, OpenRow, read_decisions, response_sha256, reviews_file
from kd.scoring.rules.number import canonical
from kd.scoring.rules.rule import UNDECIDED

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


BY_HAND = "by-hand"


@dataclass(frozen=True)
class Response:
    """What a student wrote: text without the prompt, its length in tokens, and whether it ran into the limit."""

    text: str
    tokens: int
    reached_limit: bool


@dataclass(frozen=True)
class Answered:
    """One row of a log: the response without its prompt, how long it is, and what was taken from it: by a rule, by a
    person (`BY_HAND`; "-1" is no answer) or by neither (`UNDECIDED`; None)."""

    question: str
    answer: str
    response: str
    tokens: int
    reached_limit: bool
    taken: str | None
    rule: str
    right: bool


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


def read_answered(config: Config, experiment: str) -> list[Answered]:
    """The rows of an experiment's log, with what a person decided of them (reviews/<experiment>.csv)."""
    path, suffix = log_file(config, experiment), config.experiments[experiment].suffix
    decisions = read_decisions(reviews_file(experiment))
    return [
        _answered(path, number, row, suffix, decisions)
        for number, row in enumerate(read_log(config, experiment), start=1)
    ]


def score(rows: Sequence[Answered]) -> Score:
    """What the rows of a log come to."""
    return Score(
        [row.right for row in rows],
        [number for number, row in enumerate(rows, start=1) if row.rule == UNDECIDED],
        sum(row.rule == BY_HAND for row in rows),
    )


def open_rows(config: Config, experiment: str) -> list[OpenRow]:
    """The rows of an experiment's log that no rule settles."""
    suffix = config.experiments[experiment].suffix
    return [
        OpenRow(number, row["question"], without_prompt(row["model_answer"], row["question"] + suffix))
        for number, row in enumerate(read_log(config, experiment), start=1)
        if row["rule"] == UNDECIDED
    ]


def _answered(
    path: Path, number: int, row: dict[str, str], suffix: str, decisions: Mapping[str, Mapping[str, str]]
) -> Answered:
    question, tokens, rule = row["question"], row["model_output_tokens"], row["rule"]
    if not tokens.isdecimal():
        raise UserError(f"{path} row {number}: model_output_tokens is {tokens!r}, expected a number")
    response = without_prompt(row["model_answer"], question + suffix)
    taken, right = row["extracted_answer"], row["correct"] == "True"
    decision = decisions.get(response_sha256(question, response)) if rule == UNDECIDED else None
    if decision:
        rule, taken, right = BY_HAND, decision["answer"], is_correct(decision["answer"], row["answer"])
    return Answered(
        question=question,
        answer=row["answer"],
        response=response,
        tokens=int(tokens),
        reached_limit=row["model_max_tokens"] == "True",
        taken=None if rule == UNDECIDED else taken,
        rule=rule,
        right=right,
    )
