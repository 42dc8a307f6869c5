"""Text at the border of `kd`: terminals that cannot show all of it, data that holds halves of characters, folders given
for files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from params import keep
from rows import prepare_tests

from kd.cli import main
from kd.config import load_config
from kd.scoring.log import Response, log_text, read_answered

TEXT = "Wie viel ist es, \N{GREEK SMALL LETTER PI} \N{GRINNING FACE}\u2028 \x1b[2J?"
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


def kd(encoding: str, *arguments: str, given: bytes = b"") -> tuple[str, str]:
    """`kd` at a terminal of that encoding; what it says, once it has ended well."""
    command = [sys.executable, "-m", "kd.cli", *arguments]
    variables = environment() | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, input=given, capture_output=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_is_shown_at_any_terminal(encoding: str) -> None:
    shown, _ = kd(encoding, "attention", "--help")
    assert ("L:H,…" if encoding in ("utf-8", "cp1252") else "L:H,\\u2026") in shown


@pytest.fixture
def open_row(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> Path:
    """One question and one open response, both of characters that few terminals have; returns the log."""
    tiny_params["dataset"]["test_rows"] = 1
    keep(tiny_params, "base-kd")
    write_params(tiny_params)
    tests = prepare_tests([(TEXT, "#### 7")])
    log = Path("artifacts/mini/logs/base-kd-1.csv")
    log.parent.mkdir()
    log.write_text(log_text(tests, [TEXT], [Response(" \N{SNOWMAN}, I think", 3, False)]), encoding="utf-8", newline="")
    return log


@pytest.mark.usefixtures("open_row")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_response_is_reviewed_at_any_terminal(encoding: str) -> None:
    shown, said = kd(encoding, "review", "base-kd", given=b"\xff\xe2\x88\x92\n7\n")
    snowman = "\N{SNOWMAN}" if encoding == "utf-8" else "\\u2603"
    assert f"{snowman}, I think" in shown
    assert "\x1b" not in shown
    assert "is not a number" in shown
    assert "1 of 1 rows decided" in said
    (row,) = read_answered(load_config(Path("params.yaml")), "base-kd-1")
    assert row.right


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_halves_of_characters_are_extracted_from(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d so 5 \\ude00"}\r\n\r\n{"text": "6\xe2\x80\xa8 \\u0000 7"}')
    shown, _ = kd(encoding, "extract", str(file), "--column", "text", "--json")
    assert [row["answer"] for row in json.loads(shown)] == ["5", "7"]


@pytest.fixture
def gsm8k(tmp_path: Path, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> Path:
    """A data set of one row a split, which the params name."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"question": "3 + 4?", "answer": "#### 7"}\n')
    dataset = {"source": "folder", "path": "gsm8k", "answers": "main", "train_rows": 1, "test_rows": 1}
    write_params(tiny_params | {"dataset": dataset})
    return folder


@pytest.mark.parametrize("key", ["question", "answer"])
def test_half_a_character_in_a_data_set_is_refused_before_anything_is_written(
    gsm8k: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    row = {"question": "3 + 4?", "answer": "#### 7"}
    row[key] = f"\ud83d {row[key]}"
    (gsm8k / "test.jsonl").write_text("\n" + json.dumps(row) + "\n")
    assert main(["prepare"]) == 2
    said = (
        f"kd: gsm8k/test.jsonl line 2: {key}: \\ud83d is half a character; write the whole character, or leave it out\n"
    )
    assert capsys.readouterr().err == said
    assert not Path("artifacts").exists()
    (gsm8k / "test.jsonl").write_text(json.dumps(row).replace("\\ud83d", "\\ud83d\\ude00") + "\n")  # as it says
    assert main(["prepare"]) == 0


def test_a_data_set_with_a_byte_order_mark_loses_no_row(gsm8k: Path) -> None:
    for path in gsm8k.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    Path("params.yaml").write_bytes(b"\xef\xbb\xbf" + Path("params.yaml").read_bytes())
    assert main(["prepare"]) == 0
    assert json.loads(Path("artifacts/mini/data/test.jsonl").read_text())["question"] == "3 + 4?"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(gsm8k: Path, capsys: pytest.CaptureFixture[str], number: str) -> None:
    path = gsm8k / "train.jsonl"
    path.write_text(path.read_text().replace("{", f'{{"id": {number}, '))
    assert main(["prepare"]) == 2
    assert "kd: gsm8k/train.jsonl line 1: id: expected a finite number, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "extract given --column text",
        "report --params given",
        "review base-kd --import given",
        "review base-kd --export given",
        "store import given store --prompt base",
    ],
)
def test_a_folder_given_for_a_file_is_refused(open_row: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    del open_row
    Path("given").mkdir()
    assert main(command.split()) == 2
    assert capsys.readouterr().err == "kd: given: is a folder; name a file\n"
    assert not list(Path("given").iterdir())


@pytest.mark.parametrize("command", ["audit --data given", "audit --output given"])
def test_a_file_given_for_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("given").write_text("kept")
    assert main(command.split()) == 2
    assert capsys.readouterr().err == "kd: given: is a file; name a folder\n"
    assert Path("given").read_text() == "kept"


def test_a_log_that_is_a_folder_is_refused(open_row: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_row.unlink()
    open_row.mkdir()
    assert main(["report"]) == 2
    assert capsys.readouterr().err == f"kd: {open_row}: is a folder; name a file\n"
    shutil.rmtree(open_row)
