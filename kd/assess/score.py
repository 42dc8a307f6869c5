"""Assessment logs: one row per test question, the original's columns and what the rules took from the response."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from kd import models
from kd.assess.extract import extract
from kd.assess.generate import load_student, respond
from kd.assess.rules.number import canonical
from kd.assess.rules.rule import UNDECIDED
from kd.config import Config
from kd.dataset import Example, final_answer, read_examples
from kd.errors import UserError
from kd.files import read_table, write_whole_file

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
NO_ANSWER = "-1"


@dataclass(frozen=True)
class Score:
    """What a log comes to. `undecided` lists the 1-based rows that no rule settled; they count as wrong."""

    rows: int
    correct: int
    undecided: list[int]


def assess(config: Config, experiment: str) -> None:
    """Let one student answer the test questions and write artifacts/<profile>/logs/<experiment>.csv."""
    settings = config.experiments[experiment]
    examples = read_examples(config.artifacts / "data" / "test.jsonl")
    folder = models.model_folder(config.student.model)
    adapter = config.artifacts / "adapters" / settings.adapter if settings.adapter else None
    student = load_student(
        folder,
        config.student.dtype,
        adapter,
        models.model_name(config.student.model),
        models.default_device(),
    )
    prompts = [example.question + settings.suffix for example in examples]
    responses = respond(
        student,
        models.load_tokenizer(folder),
        prompts,
        settings.max_new_tokens,
        config.assess.batch_rows,
        f"assess, {experiment}",
    )
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
                is_correct(found.answer, example),
            ]
        )
    write_whole_file(config.artifacts / "logs" / f"{experiment}.csv", table.getvalue())


def is_correct(answer: str | None, example: Example) -> bool:
    """Whether an extracted answer is the number behind the row's "####"."""
    truth = final_answer(example.answer)
    assert truth is not None, example.id  # refused when the data was prepared
    return answer == canonical("-" if truth.startswith("-") else "", truth.lstrip("-"))


def read_score(path: Path, rows: int) -> Score:
    """The score of a log, which must have `rows` rows."""
    if not path.exists():
        raise UserError(f"{path}: no such file; run `kd assess {path.stem}`")
    table = read_table(path, COLUMNS)
    if len(table) != rows:
        raise UserError(f"{path}: {len(table)} rows where the test set has {rows}; run `kd assess {path.stem}` again")
    return Score(
        rows=rows,
        correct=sum(row["correct"] == "True" for row in table),
        undecided=[i for i, row in enumerate(table, start=1) if row["rule"] == UNDECIDED],
    )
