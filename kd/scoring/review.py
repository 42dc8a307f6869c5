"""Hand review: what a person takes from responses that no rule settles, kept in reviews/<run>.csv.

A decision belongs to one response to one question, by checksum, so it survives another order of rows and another
profile's logs beside it, and is never applied to a response that a new run changed.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.data.number import from_cell, given, whole_number
from kd.errors import UserError
from kd.io.files import write_whole_file
from kd.io.table import formula_free, read_table, restored, table_text
from kd.io.text import printable, refuse_folder
from kd.scoring.rules.number import numbers

FOLDER = Path("reviews")
NO_ANSWER = "-1"  # as in the original's logs
COLUMNS = ("row", "question", "sha256", "answer")
SHEET_COLUMNS = ("row", "question", "response", "sha256", "answer")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HELP = "a number, none (the response gives no answer), skip or quit"


@dataclass(frozen=True)
class OpenRow:
    """A response that no rule settles: its 1-based row in the log, its question and the text without the prompt."""

    row: int
    question: str
    response: str

    @property
    def sha256(self) -> str:
        """What a decision is tied to."""
        return response_sha256(self.question, self.response)


def response_sha256(question: str, response: str) -> str:
    """SHA-256 of a question and a response to it."""
    return hashlib.sha256(f"{question}\0{response}".encode("utf-8", "surrogatepass")).hexdigest()


def reviews_file(experiment: str) -> Path:
    """Where an experiment's decisions lie."""
    return FOLDER / f"{experiment}.csv"


def read_decisions(path: Path) -> dict[str, dict[str, str]]:
    """The decisions in `path` (none where there is no such file) by checksum, each a row of COLUMNS."""
    if not path.exists():
        return {}
    decisions: dict[str, dict[str, str]] = {}
    for number, row in enumerate(read_table(path, COLUMNS), start=1):
        if not any(row.values()):  # spreadsheets leave such rows at the end
            continue
        row["answer"] = _of_cell(row["answer"]) or _refuse(path, number, row["answer"])
        sha256 = row["sha256"].strip().lower()
        if not _SHA256.fullmatch(sha256):
            raise UserError(
                f"{path} row {number}: sha256 is {row['sha256']!r}, expected 64 hexadecimal digits; undo the change"
            )
        if whole_number(row["row"]) is None:
            raise UserError(f"{path} row {number}: row is {row['row']!r}, expected the number of a test question")
        if decisions.setdefault(sha256, row)["answer"] != row["answer"]:
            raise UserError(f"{path} row {number}: another answer to a response that an earlier row decides; keep one")
        row["row"], row["sha256"] = str(whole_number(row["row"])), sha256
        row["question"] = restored(row["question"])
    return decisions


def review(open_rows: Sequence[OpenRow], path: Path) -> None:
    """Ask for each open row that has no decision yet and save after every answer; ends at the last row, `quit`,
    the end of input or Ctrl-C, and goes on there the next time."""
    decisions = read_decisions(path)
    waiting = [row for row in open_rows if row.sha256 not in decisions]
    try:
        for place, row in enumerate(waiting, start=1):
            print(f"\nRow {row.row} ({place} of {len(waiting)})\n")
            print(f"{printable(row.question)}\n\n{highlighted(row.response)}\n")
            answer = _ask()
            if answer is not None:
                _save(path, decisions, [(row, answer)])
    except (EOFError, KeyboardInterrupt):
        print()
    left = sum(row.sha256 not in decisions for row in open_rows)
    print(f"{len(open_rows) - left} of {len(open_rows)} rows decided in {path}; {left} left", file=sys.stderr)


def export_sheet(open_rows: Iterable[OpenRow], decisions: Mapping[str, Mapping[str, str]], sheet: Path) -> None:
    """Write the open rows with their responses and the decisions so far, to be filled in with a spreadsheet.

    No cell is a formula to it, whatever a model or a data set wrote (`restored` gives the text back).
    """
    refuse_folder(sheet)
    decided = {sha256: decision["answer"] for sha256, decision in decisions.items()}
    rows = [(str(row.row), row.question, row.response, row.sha256, decided.get(row.sha256, "")) for row in open_rows]
    write_whole_file(sheet, table_text([SHEET_COLUMNS, *([formula_free(cell) for cell in row] for row in rows)]))


def import_sheet(open_rows: Iterable[OpenRow], path: Path, sheet: Path) -> int:
    """Take the answers of a filled-in sheet (a number or `none`; empty is still open) into `path`; returns how many.

    Nothing is taken unless every row of the sheet is one of the open rows and every answer is usable.
    """
    known = {row.sha256: row for row in open_rows}
    taken: dict[str, tuple[OpenRow, str]] = {}
    for number, line in enumerate(read_table(sheet, ("sha256", "answer")), start=1):
        given = restored(line["answer"].strip())
        if not given:
            continue
        row = known.get(line["sha256"].strip().lower())
        if not row:
            raise UserError(
                f"{sheet} row {number}: not a response that is open in this log; --export it again and fill that in"
            )
        answer = _of_cell(given, row.response) or _refuse(sheet, number, given)
        if taken.setdefault(row.sha256, (row, answer)) != (row, answer):
            raise UserError(f"{sheet} row {number}: another answer to a response that an earlier row decides; keep one")
    _save(path, read_decisions(path), taken.values())
    return len(taken)


def highlighted(response: str) -> str:
    """The response with its numbers marked: in reverse at a terminal, in brackets elsewhere."""
    before, behind = ("\x1b[7m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    parts, end = [], 0
    for number in numbers(response):
        parts += [printable(response[end : number.start]), before, response[number.start : number.stop], behind]
        end = number.stop
    return "".join([*parts, printable(response[end:])])


def _ask() -> str | None:
    """The answer given for one row; None to skip it. EOFError to quit."""
    while True:
        typed = input(f"Answer ({_HELP}): ").strip()
        match typed.lower():
            case "skip" | "s":
                return None
            case "quit" | "q":
                raise EOFError
        answer = _parse(typed)
        if answer is not None:
            return answer
        print(f"{typed!r} is not {_HELP}")


def _parse(typed: str) -> str | None:
    """An answer in canonical spelling; None where it is neither a number nor `none`."""
    return NO_ANSWER if typed.lower() == "none" else given(typed)


def _of_cell(cell: str, response: str = "") -> str | None:
    """The same of a spreadsheet's cell, which may have changed how a number looks; None also where it may be two
    numbers, of which not one alone stands in the `response`."""
    if cell.strip().lower() == "none":
        return NO_ANSWER
    return from_cell(cell, {number.answer for number in numbers(response)})


def _refuse(path: Path, row: int, answer: str) -> str:
    raise UserError(f"{path} row {row}: answer is {answer!r}, expected a number or none; write it as in 70000 or 2.5")


def _save(path: Path, decisions: dict[str, dict[str, str]], taken: Iterable[tuple[OpenRow, str]]) -> None:
    for row, answer in taken:
        decisions[row.sha256] = {
            "row": str(row.row),
            "question": row.question,
            "sha256": row.sha256,
            "answer": answer,
        }
    ordered = sorted(decisions.values(), key=lambda decision: (int(decision["row"]), decision["sha256"]))
    rows = ((row["row"], formula_free(row["question"]), row["sha256"], row["answer"]) for row in ordered)
    write_whole_file(path, table_text([COLUMNS, *rows]))
