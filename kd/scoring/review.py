"""Hand review: what a person takes from responses that no rule settles, kept in reviews/<experiment>.csv.

A decision belongs to one response to one question, by checksum, so it survives another order of rows and another
profile's logs beside it, and is never applied to a response that a new run changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.errors import UserError
from kd.io.files import read_table, write_whole_file
from kd.scoring.rules.number import MINUS, canonical, numbers

FOLDER = Path("reviews")
NO_ANSWER = "-1"  # as in the original's logs
COLUMNS = ("row", "question", "sha256", "answer")
SHEET_COLUMNS = ("row", "question", "response", "sha256", "answer")

_GIVEN = re.compile(rf"([{MINUS}]?)\$?([0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|\.[0-9]+)%?")
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
    rows = read_table(path, COLUMNS)
    for number, row in enumerate(rows, start=1):
        row["answer"] = _parse(row["answer"]) or _refuse(path, number, row["answer"])
    return {row["sha256"]: row for row in rows}


def review(open_rows: Sequence[OpenRow], path: Path) -> None:
    """Ask for each open row that has no decision yet and save after every answer; ends at the last row, `quit`,
    the end of input or Ctrl-C, and goes on there the next time."""
    decisions = read_decisions(path)
    waiting = [row for row in open_rows if row.sha256 not in decisions]
    try:
        for place, row in enumerate(waiting, start=1):
            print(f"\nRow {row.row} ({place} of {len(waiting)})\n\n{row.question}\n\n{highlighted(row.response)}\n")
            answer = _ask()
            if answer is not None:
                _save(path, decisions, [(row, answer)])
    except (EOFError, KeyboardInterrupt):
        print()
    left = sum(row.sha256 not in decisions for row in open_rows)
    print(f"{len(open_rows) - left} of {len(open_rows)} rows decided in {path}; {left} left", file=sys.stderr)


def export_sheet(open_rows: Iterable[OpenRow], decisions: Mapping[str, Mapping[str, str]], sheet: Path) -> None:
    """Write the open rows with their responses and the decisions so far, to be filled in with a spreadsheet."""
    rows = [
        {**vars(row), "sha256": row.sha256, "answer": decisions.get(row.sha256, {}).get("answer", "")}
        for row in open_rows
    ]
    write_whole_file(sheet, _csv(SHEET_COLUMNS, rows))


def import_sheet(open_rows: Iterable[OpenRow], path: Path, sheet: Path) -> int:
    """Take the answers of a filled-in sheet (a number or `none`; empty is still open) into `path`; returns how many.

    Nothing is taken unless every row of the sheet is one of the open rows and every answer is usable.
    """
    known = {row.sha256: row for row in open_rows}
    taken = []
    for number, line in enumerate(read_table(sheet, ("sha256", "answer")), start=1):
        if not line["answer"].strip():
            continue
        if line["sha256"] not in known:
            raise UserError(
                f"{sheet} row {number}: not a response that is open in this log; --export it again and fill that in"
            )
        answer = _parse(line["answer"]) or _refuse(sheet, number, line["answer"])
        taken.append((known[line["sha256"]], answer))
    _save(path, read_decisions(path), taken)
    return len(taken)


def highlighted(response: str) -> str:
    """The response with its numbers marked: in reverse at a terminal, in brackets elsewhere."""
    before, behind = ("\x1b[7m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    parts, end = [], 0
    for number in numbers(response):
        parts += [_printable(response[end : number.start]), before, response[number.start : number.stop], behind]
        end = number.stop
    return "".join([*parts, _printable(response[end:])])


def _printable(text: str) -> str:
    """Control characters (a response may hold a terminal's) and lone surrogates as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _ask() -> str | None:
    """The answer given for one row; None to skip it. EOFError to quit."""
    while True:
        given = input(f"Answer ({_HELP}): ").strip()
        match given.lower():
            case "skip" | "s":
                return None
            case "quit" | "q":
                raise EOFError
        answer = _parse(given)
        if answer is not None:
            return answer
        print(f"{given!r} is not {_HELP}")


def _parse(given: str) -> str | None:
    """An answer in canonical spelling; None where it is neither a number nor `none`."""
    if given.strip().lower() == "none":
        return NO_ANSWER
    match = _GIVEN.fullmatch(given.strip())
    return canonical(match[1], match[2]) if match else None


def _refuse(path: Path, row: int, answer: str) -> str:
    raise UserError(f"{path} row {row}: answer is {answer!r}, expected a number or none")


def _save(path: Path, decisions: dict[str, dict[str, str]], taken: Iterable[tuple[OpenRow, str]]) -> None:
    for row, answer in taken:
        decisions[row.sha256] = {
            "row": str(row.row),
            "question": row.question,
            "sha256": row.sha256,
            "answer": answer,
        }
    ordered = sorted(decisions.values(), key=lambda decision: (int(decision["row"]), decision["sha256"]))
    write_whole_file(path, _csv(COLUMNS, ordered))


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()
