"""The number a response gives as its answer, by a set of rules; what they cannot settle is left to a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from kd.errors import UserError
from kd.io.files import json_lines
from kd.io.table import read_table
from kd.scoring.rules import harness
from kd.scoring.rules.documented import documented
from kd.scoring.rules.math_verify import math_verify
from kd.scoring.rules.notebook import notebook
from kd.scoring.rules.robust import robust
from kd.scoring.rules.rule import Extraction, RuleSet

RULE_SETS: dict[str, RuleSet] = {
    "documented": documented,
    "notebook": notebook,
    "robust": robust,
    "lm-eval-strict": harness.strict,
    "lm-eval-flexible": harness.flexible,
    "math-verify": math_verify,
}


def extract(responses: Iterable[str], rules: str = "documented") -> Iterator[Extraction]:
    """What the rule set named `rules` takes from each response (without its prompt), in order."""
    return RULE_SETS[rules](responses)


def extract_one(response: str, rules: str) -> Extraction:
    """What a rule set takes from a single response, for another process to find out."""
    (found,) = extract([response], rules)
    return found


def read_responses(path: Path, column: str, prompt_column: str | None) -> list[str]:
    """The texts in `column` of a CSV or JSON lines file, each without the prompt it starts with.

    JSON lines are known by the file name's ending: .jsonl or .ndjson.
    """
    columns = [column] if prompt_column is None else [column, prompt_column]
    lines = path.suffix.lower() in {".jsonl", ".ndjson"}
    rows = _read_json_lines(path, columns) if lines else read_table(path, columns)
    if prompt_column is None:
        return [row[column] for row in rows]
    return [without_prompt(row[column], row[prompt_column]) for row in rows]


def without_prompt(text: str, prompt: str) -> str:
    """A response as the original reads it: its prompt taken off the front, then white space off both ends."""
    return text.removeprefix(prompt).strip()


def _read_json_lines(path: Path, columns: list[str]) -> list[dict[str, str]]:
    rows = []
    for number, row in json_lines(path):
        for column in columns:
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise UserError(f"{path} line {number}: {column!r} is missing or not text")
        rows.append(cast(dict[str, str], row))
    return rows
