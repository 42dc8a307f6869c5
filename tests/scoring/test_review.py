"""`kd review`: hand decisions are saved one by one, tied to their responses, and counted by the report."""

from __future__ import annotations

import csv
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from params import keep
from rows import prepare_tests

from kd.cli import main
from kd.config import load_config
from kd.io.table import read_table, restored
from kd.io.text import printable
from kd.report.reading import read_runs
from kd.report.results import collect
from kd.scoring.log import COLUMNS
from kd.scoring.review import SHEET_COLUMNS, OpenRow, export_sheet, highlighted

LOG = Path("artifacts/mini/logs/teacher-kd-1.csv")
DECISIONS = Path("reviews/teacher-kd-1.csv")
# Row 2 is settled by a rule; 1, 3 and 4 are open. The true answers are 10, 20, 30, 40.
RESPONSES = ["ten, I think", "It is 20", "no, thirty", "forty \x1b[2J\ud83d"]


@pytest.fixture
def log(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> None:
    tiny_params["dataset"]["test_rows"] = 4
    keep(tiny_params, "teacher-kd")
    write_params(tiny_params)
    prepare_tests((f"How many is {i}0?", f"It is.\n#### {i}0") for i in range(1, 5))
    write_log(RESPONSES)


def write_log(responses: list[str]) -> None:
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, response in enumerate(responses, start=1):
            settled = i == 2
            writer.writerow(
                {
                    "question": f"How many is {i}0?",
                    "answer": f"It is.\n#### {i}0",
                    "model_answer": f"How many is {i}0? {response}",
                    "model_output_tokens": 9,
                    "model_max_tokens": False,
                    "extracted_answer": "20" if settled else "-1",
                    "rule": "first-line" if settled else "undecided",
                    "correct": settled,
                }
            )


def answer_with(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """What a person types, then the end of input."""
    typed = iter(answers)

    def read(_: str = "") -> str:
        for answer in typed:
            return answer
        raise EOFError

    monkeypatch.setattr("builtins.input", read)


def decided() -> dict[str, str]:
    with DECISIONS.open(newline="") as file:
        return {row["row"]: row["answer"] for row in csv.DictReader(file)}


def reported() -> dict[str, Any]:
    """The run's results, as `kd report` has them, without its charts and its page."""
    config = load_config(Path("params.yaml"))
    result: dict[str, Any] = collect(config, read_runs(config))["experiments"]["teacher-kd"]["runs"][0]
    return result


@pytest.mark.usefixtures("log")
def test_answers_are_kept_and_counted_and_the_next_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"correct": 1, "rows": 4, "accuracy": 0.25, "by_hand": 0, "undecided": [1, 3, 4]}
    assert before.items() <= reported().items()
    answer_with(monkeypatch, "ten", "$10.00", "skip", "quit")
    assert main(["review", "teacher-kd"]) == 0
    shown = capsys.readouterr()
    assert "How many is 10?" in shown.out
    assert "20?" not in shown.out  # a rule settled it
    assert "####" not in shown.out  # a reviewer does not see the true answer
    assert "'ten' is not a number" in shown.out
    assert "1 of 3 rows decided" in shown.err
    assert decided() == {"1": "10"}

    answer_with(monkeypatch, "none")
    assert main(["review", "teacher-kd"]) == 0  # goes on at row 3; the input ends at row 4
    assert "10?" not in capsys.readouterr().out
    assert decided() == {"1": "10", "3": "-1"}
    result = reported()
    assert (result["correct"], result["by_hand"], result["undecided"]) == (2, 2, [4])


@pytest.mark.usefixtures("log")
def test_a_decision_does_not_count_for_another_response(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "10", "30")
    assert main(["review", "teacher-kd"]) == 0
    write_log(["eleven", *RESPONSES[1:]])
    result = reported()
    assert (result["correct"], result["by_hand"], result["undecided"]) == (2, 1, [1, 4])
    answer_with(monkeypatch, "11")
    assert main(["review", "teacher-kd"]) == 0
    write_log(RESPONSES)
    assert reported()["undecided"] == [4]  # the first response's decision was kept beside the new one


@pytest.mark.usefixtures("log")
def test_a_sheet_goes_out_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "10")
    assert main(["review", "teacher-kd"]) == 0
    assert main(["review", "teacher-kd", "--export", "sheet.csv"]) == 0
    with Path("sheet.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["answer"]) for row in rows] == [("1", "10"), ("3", ""), ("4", "")]
    assert rows[1]["response"] == "no, thirty"
    rows[1]["answer"] = " 30 "
    write_sheet(rows[::-1])
    assert main(["review", "teacher-kd", "--import", "sheet.csv"]) == 0
    assert decided() == {"1": "10", "3": "30"}
    assert reported()["undecided"] == [4]


FORMULAS = [
    '=HYPERLINK("http://a")',
    "+one",
    "-cmd|' /C calc'!A0",
    "@SUM(A)",
    "'=quoted",
    "' apostrophe",
    "\uff1dx",
    "plain",
]


@pytest.mark.usefixtures("log")
def test_no_cell_of_a_sheet_is_a_formula_and_responses_come_back_unchanged() -> None:
    prepare_tests((f"How many is {i}0?", f"It is.\n#### {i}0") for i in range(1, 5))
    write_log([FORMULAS[0], "It is 20", FORMULAS[1], FORMULAS[2]])
    assert main(["review", "teacher-kd", "--export", "sheet.csv"]) == 0
    with Path("sheet.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["response"] for row in rows] == [f"'{response}" for response in FORMULAS[:3]]
    assert [restored(row["response"]) for row in rows] == FORMULAS[:3]
    rows[0]["answer"], rows[1]["answer"] = "'-10", "-30"  # as a cell that is text, and as a number
    write_sheet(rows)
    assert main(["review", "teacher-kd", "--import", "sheet.csv"]) == 0
    assert decided() == {"1": "-10", "3": "-30"}
    assert main(["review", "teacher-kd", "--export", "again.csv"]) == 0
    assert main(["review", "teacher-kd", "--import", "again.csv"]) == 0
    assert decided() == {"1": "-10", "3": "-30"}


@given(st.text(max_size=40) | st.text("='+-@\t\r\n \"a;,", max_size=6), st.sampled_from(FORMULAS))
def test_any_text_goes_through_a_sheet_unharmed(text: str, formula: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "sheet.csv"
        export_sheet([OpenRow(1, formula, text)], {}, sheet)
        (row,) = read_table(sheet, SHEET_COLUMNS)
    assert not any(
        cell.lstrip()[:1] in set("=+-@\uff1d\uff0b\uff0d\uff20") or cell[:1] in "\t\r" for cell in row.values() if cell
    )
    assert (restored(row["question"]), restored(row["response"])) == (formula, text)


def write_sheet(rows: list[dict[str, str]]) -> None:
    with Path("sheet.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "thirty"}, "sheet.csv row 2: answer is 'thirty', expected a number or none"),
        ({"answer": "30", "sha256": "0" * 64}, "sheet.csv row 2: not a response that is open"),
    ],
)
def test_an_unusable_sheet_changes_nothing(
    capsys: pytest.CaptureFixture[str], change: dict[str, str], message: str
) -> None:
    assert main(["review", "teacher-kd", "--export", "sheet.csv"]) == 0
    with Path("sheet.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[0]["answer"] = "10"
    rows[1] |= change
    write_sheet(rows)
    assert main(["review", "teacher-kd", "--import", "sheet.csv"]) == 2
    assert message in capsys.readouterr().err
    assert not DECISIONS.exists()


SHA = "0a" * 32


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,Why?,00,many", "row 1: answer is 'many', expected a number or none"),
        (f'1,Why?,{SHA},"70,000"', "row 1: answer is '70,000', expected a number or none; write it as in 70000"),
        ("1,Why?,1E+63,7", "row 1: sha256 is '1E+63', expected 64 hexadecimal digits; undo"),
        (f"first,Why?,{SHA},7", "row 1: row is 'first', expected the number of a test question"),
        (
            f"1,Why?,{SHA},7\n1,Why?,{SHA},8",
            "row 2: another answer to a response that an earlier row decides; keep one",
        ),
    ],
)
def test_spoilt_decisions_are_refused(capsys: pytest.CaptureFixture[str], rows: str, message: str) -> None:
    DECISIONS.parent.mkdir()
    DECISIONS.write_text(f"row,question,sha256,answer\n{rows}\n")
    assert main(["report"]) == 2
    assert f"reviews/teacher-kd-1.csv {message}" in capsys.readouterr().err


@pytest.mark.usefixtures("log")
def test_decisions_that_were_saved_by_a_spreadsheet_count_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "10", "30")
    assert main(["review", "teacher-kd"]) == 0
    before = reported()
    with DECISIONS.open(newline="") as file:
        rows = list(csv.reader(file))
    saved = [
        rows[0],
        *([f"{row}.0", question, sha.upper(), f"{answer},00"] for row, question, sha, answer in rows[:0:-1]),
    ]
    lines = [";".join(f'"{cell}"' for cell in row) for row in [*saved, [""] * 4]]
    DECISIONS.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert reported() == before
    answer_with(monkeypatch, "40")
    assert main(["review", "teacher-kd"]) == 0  # and are written as ever
    assert decided() == {"1": "10", "3": "30", "4": "40"}


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(
    ("answer", "taken"),
    [("1.000", None), ("2,000", "2000"), ("2.000", "2000"), ("30,5", "30.5"), ("NONE", "-1"), ("1\u202f000", "1000")],
)
def test_a_number_that_may_be_two_is_the_one_that_stands_in_the_response(answer: str, taken: str | None) -> None:
    write_log([*RESPONSES[:2], "no, thirty or 2,000", RESPONSES[3]])
    assert main(["review", "teacher-kd", "--export", "sheet.csv"]) == 0
    with Path("sheet.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[1]["answer"] = answer
    write_sheet(rows)
    assert main(["review", "teacher-kd", "--import", "sheet.csv"]) == (0 if taken else 2)
    assert not taken or decided() == {"3": taken}


def test_numbers_are_highlighted_and_a_terminal_is_not_fooled(capsys: pytest.CaptureFixture[str]) -> None:
    assert highlighted("so 3 + 4,000 = 4,003.\nYes") == "so [3] + [4,000] = [4,003].\nYes"
    assert highlighted("\x1b[2J \ud800 5") == "\\x1b[[2]J \\ud800 [5]"
    assert capsys.readouterr().out == ""


@given(st.text(alphabet=st.characters(codec=None), max_size=60))
def test_nothing_that_rules_a_terminal_is_shown(text: str) -> None:
    """No control characters, no escape sequences, no marks that turn the direction of writing."""
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown if c not in "\n\t")
    assert shown == text or "\\" in shown


@pytest.mark.usefixtures("log")
def test_messages_show_no_control_characters_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("log.csv").write_text("a\x1b[2J\u202e,b\n1,2\n")
    assert main(["extract", "log.csv", "--column", "text"]) == 2
    error = capsys.readouterr().err
    assert "first line names a\\x1b[2J\\u202e, b" in error
    assert error.rstrip("\n").isprintable()


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_reviewer_who_is_interrupted_loses_no_answer(signal_number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kd.cli", "review", "teacher-kd"],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        # A shell's background jobs ignore SIGINT and hand that down; a reviewer sits in the foreground.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.write(ours, b"10\n")
    deadline = time.monotonic() + 30
    while not DECISIONS.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert decided() == {"1": "10"}
    if signal_number == signal.SIGINT:
        assert process.returncode == 0
        assert b"1 of 3 rows decided" in error
