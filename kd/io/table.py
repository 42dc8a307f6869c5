"""Tables as CSV: written in one way, and read in every way that spreadsheets save them."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kd.errors import UserError
from kd.io.text import read_text

DELIMITERS = ",;\t"  # a comma; a semicolon where the comma is the decimal point
_QUOTED = re.compile('[",\r\n]')
_FORMULA = re.compile(r"['\t\r\n]|\s*+[=+@\uff1d\uff0b\uff0d\uff20-]")  # full width as well
_LONE_LINE_END = re.compile(r"(?<!\r)\n")


def table_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, the first as the header. Whatever text a cell holds comes back from `read_table` the same.

    Not by the csv module, which before Python 3.11.9 leaves a carriage return without quotes.
    """
    return "".join((",".join(_cell(str(cell)) for cell in row) or '""') + "\n" for row in rows)


def formula_free(text: str) -> str:
    """The text of a cell so that a spreadsheet takes it for text and not for a formula: where it begins as one, or with
    the apostrophe itself, with an apostrophe before it."""
    return f"'{text}" if _FORMULA.match(text) else text


def restored(text: str) -> str:
    """The text that `formula_free` made safe."""
    return text.removeprefix("'")


def read_table(path: Path, columns: Sequence[str], mend: str = "name another") -> list[dict[str, str]]:
    """The rows of a UTF-8 CSV file, which must have `columns` and may have more.

    Cells are apart by a comma, a semicolon or a tab, whichever finds the columns in the first line; empty lines are
    passed over. A UserError names the file and the row at fault, rows counted from 1 behind the first line; where there
    is no such file it says how to `mend` that.
    """
    return parse_table(read_text(path, mend), path, columns)


def parse_table(text: str, path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table's text, which `path` stands for in messages, as `read_table`."""
    if not _LONE_LINE_END.search(text):  # another system's line ends, those within cells as well
        text = text.replace("\r\n", "\n")
    header, delimiter = _header(path, text, columns)
    rows: list[dict[str, str]] = []
    try:
        for number, cells in enumerate(_lines(text, delimiter)):
            if len(cells) < len(header) or any(cells[len(header) :]):
                raise UserError(f"{path} row {number}: not as many cells as the first line names; mend the row")
            if number:
                rows.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise UserError(f"{path} row {len(rows) + 1}: not readable as CSV ({error}); mend the row") from None
    return rows


def _header(path: Path, text: str, columns: Sequence[str]) -> tuple[list[str], str]:
    """The names in the first line, and the delimiter under which `columns` are among them."""
    named = {delimiter: _first_line(text, delimiter) for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda delimiter: len(set(columns).intersection(named[delimiter])))
    header = named[delimiter]
    for column in columns:
        if column not in header:
            raise UserError(f"{path}: no column {column!r}; its first line names {', '.join(header) or 'nothing'}")
        if header.count(column) > 1:
            raise UserError(f"{path}: two columns are called {column!r}; remove or rename one")
    return header, delimiter


def _first_line(text: str, delimiter: str) -> list[str]:
    try:
        return next(_lines(text, delimiter), [])
    except csv.Error:  # by this delimiter
        return []


def _lines(text: str, delimiter: str) -> Iterator[list[str]]:
    """The cells of each line that is not empty."""
    csv.field_size_limit(sys.maxsize)  # a response may be longer than the default 128 KiB
    return filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def _cell(text: str) -> str:
    return '"{}"'.format(text.replace('"', '""')) if _QUOTED.search(text) else text
