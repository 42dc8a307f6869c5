"""The number a response gives as its answer, by a set of rules; what they cannot settle is left to a person."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kd.data.number import given
from kd.data.rows import final_answer
from kd.errors import UserError
from kd.io.files import parse_json_lines
from kd.io.table import parse_table
from kd.io.text import decode, read_text
from kd.scoring.rules import harness
from kd.scoring.rules.documented import documented
from kd.scoring.rules.math_verify import math_verify
from kd.scoring.rules.notebook import notebook, spelled
from kd.scoring.rules.robust import robust
from kd.scoring.rules.rule import Extraction, RuleSet

STANDARD_INPUT = Path("standard input")  # this object, not a file of that name

RULE_SETS: dict[str, RuleSet] = {
    "documented": documented,
    "notebook": notebook,
    "robust": robust,
    "lm-eval-strict": harness.strict,
    "lm-eval-flexible": harness.flexible,
    "lm-eval-llama": harness.llama,
    "math-verify": math_verify,
}


def extract(responses: Iterable[str], rules: str = "documented") -> Iterator[Extraction]:
    """What the rule set named `rules` takes from each response (without its prompt), in order."""
    return RULE_SETS[rules](responses)


def extract_one(response: str, rules: str) -> Extraction:
    """What a rule set takes from a single response, for another process to find out."""
    (found,) = extract([response], rules)
    return found


@dataclass(frozen=True)
class Responses:
    """The texts of a file, each without the prompt it starts with, and their true answers in canonical spelling, if a
    column of those was named."""

    texts: list[str]
    truths: list[str] | None


def read_responses(
    path: Path, column: str, prompt_column: str | None = None, truth_column: str | None = None
) -> Responses:
    """The texts in `column` of a CSV or JSON lines file, or of standard input (`STANDARD_INPUT`).

    JSON lines are known by the file name's ending, .jsonl or .ndjson; standard input by its first character. A truth
    may be a number in any dress or a GSM8K answer, which ends in `####` and a number; a UserError names the row where
    it is neither.
    """
    columns = list(dict.fromkeys(filter(None, (column, prompt_column, truth_column))))
    text = decode(sys.stdin.buffer.read(), path) if path is STANDARD_INPUT else read_text(path)
    lines = text.lstrip().startswith("{") if path is STANDARD_INPUT else path.suffix.lower() in {".jsonl", ".ndjson"}
    rows = _json_rows(text, path, columns, truth_column) if lines else _table_rows(text, path, columns)
    return Responses(
        [row[column] if not prompt_column else without_prompt(row[column], row[prompt_column]) for _, row in rows],
        [_truth(where, truth_column, row[truth_column]) for where, row in rows] if truth_column else None,
    )


def without_prompt(text: str, prompt: str) -> str:
    """A response as the original reads it: its prompt taken off the front, then white space off both ends."""
    return text.removeprefix(prompt).strip()


def _table_rows(text: str, path: Path, columns: list[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table, each with where it stands."""
    return [(f"{path} row {number}", row) for number, row in enumerate(parse_table(text, path, columns), start=1)]


def _json_rows(text: str, path: Path, columns: list[str], truth_column: str | None) -> list[tuple[str, dict[str, str]]]:
    """The same of JSON lines, in which a truth may be a number."""
    rows = []
    for number, row in parse_json_lines(text, path):
        where, found = f"{path} line {number}", {}
        for column in columns:
            value = row.get(column) if isinstance(row, dict) else None
            if column == truth_column and isinstance(value, int | float) and not isinstance(value, bool):
                value = spelled(value)
            if not isinstance(value, str):
                raise UserError(f"{where}: {column!r} is missing or not text")
            found[column] = value
        rows.append((where, found))
    return rows


def _truth(where: str, column: str, cell: str) -> str:
    truth = final_answer(cell) or given(cell)
    if truth is None:
        raise UserError(f"{where}: {column} is {cell!r}, expected a number, or an answer that ends in `#### ` and one")
    return truth
