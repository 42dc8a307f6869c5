"""Text from outside: whatever a person, a spreadsheet or another system left is read right or refused in a sentence."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kd.config import read_mapping
from kd.errors import UserError
from kd.io.files import json_lines, read_json
from kd.io.table import read_table, table_text
from kd.io.text import read_text

Reader = Callable[[Path], object]
READERS: dict[str, Reader] = {
    "text": read_text,
    "table": lambda path: read_table(path, ["a"]),
    "JSON": lambda path: read_json(path, "a document"),
    "JSON lines": lambda path: list(json_lines(path)),
    "YAML": lambda path: read_mapping(path, "name another"),
}
CELL = st.text(st.characters(codec="utf-8") | st.sampled_from('"\r\n,;\t\0\u2028\x85\ufeff= '), max_size=20)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), max_size=4))
@example([("ends in a carriage return\r", "\r"), ("\r\n", "\n"), ('"', ""), ("", "")])
@example([("long " * 2**17, "\0")])
def test_any_text_comes_back_from_our_own_csv(rows: list[tuple[str, str]]) -> None:
    path, text = Path("table.csv"), table_text([("first", "second"), *rows])
    path.write_bytes(text.encode())
    assert [tuple(row.values()) for row in read_table(path, ["first", "second"])] == rows
    assert list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:] == [list(row) for row in rows]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CELL, max_size=4))
def test_a_table_of_one_column_has_no_row_less(cells: list[str]) -> None:
    Path("table.csv").write_bytes(table_text([["only"], *([cell] for cell in cells)]).encode())
    assert [row["only"] for row in read_table(Path("table.csv"), ["only"])] == cells


def test_a_lone_carriage_return_stands_in_quotes_whatever_the_version_of_python() -> None:
    assert table_text([["a\r", "b", 1, True]]) == '"a\r",b,1,True\n'


@pytest.mark.parametrize(
    "content",
    [
        b'a,b\n1,"x\ny"\n',
        b'\xef\xbb\xbfa,b\r\n1,"x\ny"\r\n',  # a spreadsheet's
        b'a;b\r\n1;"x\ny"\r\n',  # one's that has decimal commas
        b'a\tb\r\n1\t"x\ny"\r\n',
        b'a,b\r\n1,"x\r\ny"\r\n\r\n',  # turned into another system's line ends, with an empty line behind
        b'"b";"a";"more"\n"x\ny";"1";"=1+1"\n',
        b'a,b,\n1,"x\ny",,\n',  # a spreadsheet's empty columns
    ],
)
def test_a_table_is_read_as_any_spreadsheet_saves_it(content: bytes) -> None:
    Path("t.csv").write_bytes(content)
    (row,) = read_table(Path("t.csv"), ["a", "b"])
    assert (row["a"], row["b"]) == ("1", "x\ny")


def test_a_column_that_is_there_twice_is_refused() -> None:
    Path("t.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"t.csv: two columns are called 'a'; remove or rename one"):
        read_table(Path("t.csv"), ["a"])


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_refuses_what_is_no_text_file_in_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, path = READERS[kind], Path("given")

    def refused() -> str:
        with pytest.raises(UserError) as error:
            read(path)
        return str(error.value)

    assert refused().startswith("given: no such file; ")
    path.mkdir()
    assert refused() == "given: is a folder; name a file"
    path.rmdir()
    path.write_bytes("a: ä\n".encode("utf-16"))
    assert refused() == "given: UTF-16 text; save it as UTF-8"
    path.write_bytes("a: 1\n".encode("utf-16-le"))
    assert refused() == "given: UTF-16 text; save it as UTF-8"
    path.write_bytes("a: 1\nb: ä\n".encode("cp1252"))
    assert refused() == "given: not UTF-8 text (byte 0xe4 in line 2); save it as UTF-8"
    path = Path("given/below")
    assert refused().startswith("given/below: no such file; ")
    path = Path("given" * 100)
    assert ": no such file; " in refused()
    path = Path("given\0")
    assert refused().startswith("'given\\x00': no such file; ")
    path = Path("given")
    path.chmod(0)
    if os.access(path, os.R_OK):  # as root

        def denied(_: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", denied)
    assert refused().startswith("given: this user may not read it; ")


@pytest.mark.parametrize(
    ("kind", "content", "found"),
    [
        ("table", "a\n1\n", [{"a": "1"}]),
        ("JSON", '{"a": 1}', {"a": 1}),
        (
            "JSON lines",
            '{"a": 1}\n\ufeff{"a": "\u2028 \x85"}\r\n\r\n[2]',
            [(1, {"a": 1}), (2, {"a": "\u2028 \x85"}), (4, [2])],
        ),
        ("YAML", "a: 1\r\nb: [2]", {"a": 1, "b": [2]}),
    ],
)
def test_a_byte_order_mark_and_any_line_ends_change_nothing(kind: str, content: str, found: object) -> None:
    for mark in ("", "\ufeff"):
        Path("f").write_bytes((mark + content).encode())
        assert READERS[kind](Path("f")) == found


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"a": [1, NaN]}', "f: a.1: expected a finite number, found nan"),
        ("[-Infinity]", "f: 0: expected a finite number, found -inf"),
        ("1e999", "f: expected a finite number, found inf"),
        ('{"a": 1, "a": 2}', "f: a document is not readable (the key 'a' stands twice); make it again"),
        ("[" * 100_000, "f: a document is not readable (nested too deep); make it again"),
        ('{"a": "\\ud83d"}', r"f: a: \ud83d is half a character; write the whole character, or leave it out"),
        ('{"\\ude00": 1}', r"f: \ude00: \ude00 is half a character; write the whole character, or leave it out"),
    ],
)
def test_json_that_python_would_let_through_is_refused(document: str, message: str) -> None:
    Path("f").write_text(document)
    with pytest.raises(UserError) as error:
        read_json(Path("f"), "a document")
    assert str(error.value) == message


def test_two_halves_in_json_are_a_character_and_depth_alone_is_no_fault() -> None:
    Path("f").write_text('{"a": "\\ud83d\\ude00", "deep": ' + "[" * 900 + "]" * 900 + "}")
    assert read_json(Path("f"), "a document")["a"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('suffix: "\\ud83d"', r"f: suffix: \ud83d is half a character"),
        ("a: 2024-13-45", "f: not readable as YAML (ValueError: month must be in 1..12); mend the value"),
        ("a: !!bool no-bool", "f: not readable as YAML (KeyError: 'no-bool'); mend the value"),
        ("a: " + "[" * 5000, "f: not readable as YAML (RecursionError"),
        ("a: \0", "f: not readable as YAML: "),
    ],
)
def test_yaml_that_cannot_be_is_refused_in_a_sentence(document: str, message: str) -> None:
    Path("f").write_text(document)
    with pytest.raises(UserError) as error:
        read_mapping(Path("f"), "name another")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_yaml_that_holds_itself_is_read() -> None:
    Path("f").write_text("a: &itself [*itself]")
    assert read_mapping(Path("f"), "name another")["a"][0][0]
