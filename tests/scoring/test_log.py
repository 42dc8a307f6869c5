"""Logs that went through other hands: rows meet their questions, verdicts are computed, the rest is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from params import experiments, keep, run_of
from rows import prepare_tests

from kd.cli import main
from kd.config import load_config
from kd.data.rows import Example
from kd.report.reading import read_runs
from kd.report.results import collect
from kd.scoring.log import Response, log_text, read_answered

LOGS, DATA = Path("artifacts/mini/logs"), Path("artifacts/mini/data/test.jsonl")
NAMES = ["no-distillation", "base-kd", "teacher-kd"]  # the first with a suffix
TRUTHS = ["18", "70000", "2.5", "-3", "18", "7"]
RESPONSES = {
    "no-distillation": ["18", "70000", "no", "3", "1", "7"],
    "base-kd": ["\\boxed{18}", "\\boxed{70,000}", "\\boxed{2.5}", "It is -3", "\\boxed{18}", "no idea"],
    "teacher-kd": ["\\boxed{19}", "\\boxed{70}", "\\boxed{2.5}", "\\boxed{3}", "none\r", "no idea"],
}
Rows = list[dict[str, str]]


@pytest.fixture
def logs(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Six questions, of which the first stands twice, and three students' logs."""
    keep(tiny_params, *NAMES)
    write_params(tiny_params)
    write_logs(tiny_params, prepare_tests(questions("How much")))
    return tiny_params


def questions(begin: str) -> list[tuple[str, str]]:
    return [(f"{begin} is it,\nin {truth}s?", f"See:\n#### {truth}") for truth in TRUTHS]


def write_logs(params: dict[str, Any], tests: list[Example]) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        prompts = [test.question + experiments(params)[run_of(name)].suffix for test in tests]
        answers = [Response(f" {text}", 5 + i, i == 1) for i, text in enumerate(RESPONSES[name])]
        log(name).write_text(log_text(tests, prompts, answers), newline="")


def log(name: str) -> Path:
    return LOGS / f"{run_of(name)}.csv"


def rows_of(name: str) -> Rows:
    with log(name).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def save(name: str, rows: Rows, delimiter: str = ",", encoding: str = "utf-8-sig", **changes: str) -> None:
    """As a spreadsheet does: a byte order mark, carriage returns behind the rows, perhaps semicolons."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], delimiter=delimiter, **changes)  # type: ignore[arg-type]
    writer.writeheader()
    writer.writerows(rows)
    log(name).write_bytes(table.getvalue().encode(encoding))


def reported() -> dict[str, Any]:
    """The results that `kd report` writes, without its charts and its page."""
    config = load_config(Path("params.yaml"))
    document: dict[str, Any] = json.loads(json.dumps(collect(config, read_runs(config))))
    return document


def written(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The results that `kd report` prints, which are those, and its page."""
    assert main(["report", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document == reported()
    return document, Path("artifacts/mini/report/index.html").read_text()


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What `kd report` says of logs it refuses."""
    assert main(["report"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not Path("artifacts/mini/report").exists()
    return said


def test_pairs_are_made_by_question_whatever_the_order_of_a_file(
    logs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del logs
    before, page = written(capsys)
    pair = before["comparisons"][-1]
    assert (pair["first"], pair["second"], pair["only_first"], pair["only_second"]) == ("base-kd", "teacher-kd", 4, 0)
    save("base-kd", sorted(rows_of("base-kd"), key=lambda row: row["model_answer"]))
    save("teacher-kd", sorted(rows_of("teacher-kd"), key=lambda row: row["question"], reverse=True))
    after, again = written(capsys)
    assert after == before
    assert after["experiments"]["teacher-kd"]["runs"][0]["undecided"] == [5, 6]
    shown = 'id="packed">'
    assert again.partition(shown)[2].partition("<")[0] == page.partition(shown)[2].partition("<")[0]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(6)))
def test_any_order_gives_the_same_answers(logs: dict[str, Any], order: list[int]) -> None:
    del logs
    config = load_config(Path("params.yaml"))
    rows = rows_of("teacher-kd")
    right = [row.right for row in read_answered(config, "teacher-kd-1")]
    save("teacher-kd", [rows[i] for i in order])
    assert sorted(row.tokens for row in read_answered(config, "teacher-kd-1")) == list(range(5, 11))
    assert [row.right for row in read_answered(config, "teacher-kd-1")] == right
    save("teacher-kd", rows)


def test_of_a_question_that_stands_twice_the_first_row_is_the_firsts(logs: dict[str, Any]) -> None:
    del logs
    rows = rows_of("teacher-kd")
    save("teacher-kd", [rows[4], *rows[1:4], rows[0], rows[5]])
    answered = read_answered(load_config(Path("params.yaml")), "teacher-kd-1")
    assert [row.response for row in answered][::4] == ["none", "\\boxed{19}"]


def decimal_comma(number: str) -> str:
    """With points between the thousands."""
    return f"{float(number):,g}".translate(str.maketrans(",.", ".,"))


SPREADSHEETS: dict[str, tuple[str, Callable[[str], str]]] = {
    "verdicts in capitals": ("correct", str.upper),
    "verdicts of another language": ("correct", {"True": "WAHR", "False": "FALSCH"}.__getitem__),
    "no verdicts": ("correct", "".format),
    "limits in capitals": ("model_max_tokens", str.upper),
    "limits as numbers": ("model_max_tokens", lambda cell: str(int(cell == "True"))),
    "lengths with decimals": ("model_output_tokens", "{}.0".format),
    "answers with decimals": ("extracted_answer", lambda cell: f"{float(cell):.2f}"),
    "answers with thousands": ("extracted_answer", lambda cell: f" {float(cell):,.1f} "),
    "answers with points for thousands": ("extracted_answer", decimal_comma),
    "a column of one's own": ("my notes", '=A1&"{}"'.format),
    "a column without a name": ("", str),
}


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_what_a_spreadsheet_makes_of_the_cells_changes_no_result(
    logs: dict[str, Any], kind: str, delimiter: str
) -> None:
    del logs
    before = reported()
    for name in NAMES:
        column, written = SPREADSHEETS[kind]
        rows = [row | {column: written(row.get(column, ""))} for row in rows_of(name)]
        save(name, [*rows, dict.fromkeys(rows[0], "")], delimiter)
    assert reported() == before


def test_another_systems_line_ends_change_no_result(logs: dict[str, Any]) -> None:
    """A decision by hand stays with its response, too."""
    del logs
    Path("reviews").mkdir()
    assert main(["review", "base-kd", "--export", "sheet.csv"]) == 0
    Path("sheet.csv").write_text(Path("sheet.csv").read_text().rstrip("\n") + "7\n")
    assert main(["review", "base-kd", "--import", "sheet.csv"]) == 0
    before = reported()
    assert before["experiments"]["base-kd"]["runs"][0]["by_hand"] == 1
    for path in (*map(log, NAMES), Path("reviews/base-kd-1.csv")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert reported() == before


def foreign(rows: Rows) -> None:
    rows[2]["question"] = "Why?"


def other_answer(rows: Rows) -> None:
    rows[2]["answer"] = "See:\n#### 3"


REFUSED: dict[str, tuple[Callable[[Rows], object], str]] = {
    "a question of another data set": (foreign, "row 3: no test question has this question and answer; run `kd assess"),
    "another answer": (other_answer, "row 3: no test question has this question and answer; run `kd assess"),
    "a row twice": (lambda rows: rows.insert(0, rows[3]), "row 5: an earlier row has the same question; remove"),
    "a row instead of another": (
        lambda rows: rows.__setitem__(0, rows[3]), "row 4: an earlier row has the same question; remove"
    ),
    "a row less": (
        lambda rows: rows.pop(2),
        "no row of test-00003, 5 rows where the test set has 6; run `kd assess base-kd-1` again",
    ),
    "another prompt": (
        lambda rows: rows[1].update(model_answer="Why? 70000"), "row 2: model_answer does not begin with the question"
    ),
    "a limit": (lambda rows: rows[1].update(model_max_tokens="VRAI"), "row 2: model_max_tokens is 'VRAI', expected"),
    "tokens": (lambda rows: rows[1].update(model_output_tokens="1.5"), "row 2: model_output_tokens is '1.5', expected"),
    "tokens beyond all": (
        lambda rows: rows[1].update(model_output_tokens="9" * 5000), "row 2: model_output_tokens is '999"
    ),
    "tokens that may be two": (
        lambda rows: rows[1].update(model_output_tokens="9.000"), "row 2: model_output_tokens is '9.000', expected"
    ),
    "a date": (lambda rows: rows[2].update(extracted_answer="02. May"), "row 3: extracted_answer is '02. May', exp"),
    "a power": (lambda rows: rows[1].update(extracted_answer="7E+04"), "row 2: extracted_answer is '7E+04', expected"),
    "an answer that the rule did not take": (
        lambda rows: rows[1].update(extracted_answer="70001"), "row 2: extracted_answer is '70001', but boxed takes"
    ),
    "an answer that no rule took": (
        lambda rows: rows[5].update(extracted_answer="7"),
        "row 6: extracted_answer is '7', but no rule took it; `kd review` takes answers",
    ),
    "a rule": (lambda rows: rows[1].update(rule="box"), "row 2: rule is 'box', expected boxed, first-line"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_row_that_is_none_of_the_experiments_is_named(
    logs: dict[str, Any], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    del logs
    change, message = REFUSED[kind]
    rows = rows_of("base-kd")
    change(rows)
    save("base-kd", rows)
    assert f"kd: artifacts/mini/logs/base-kd-1.csv{':' if kind == 'a row less' else ''} {message}" in refusal(capsys)


@pytest.mark.parametrize(("written", "taken_for"), [("no-distillation", "base-kd"), ("base-kd", "no-distillation")])
def test_a_log_with_another_experiments_suffix_is_refused(
    logs: dict[str, Any], capsys: pytest.CaptureFixture[str], written: str, taken_for: str
) -> None:
    del logs
    shutil.copy(log(written), log(taken_for))
    said = refusal(capsys)
    assert f"{log(taken_for)} row 1: model_answer does not begin with the question and this experiment's suffix" in said


def test_a_log_of_another_data_set_does_not_come_into_the_table(
    logs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tests = DATA.read_text()
    write_logs(logs, prepare_tests(questions("How many")))
    other = log("teacher-kd").read_text()
    DATA.write_text(tests)
    write_logs(logs, prepare_tests(questions("How much")))
    log("teacher-kd").write_text(other)
    said = refusal(capsys)
    assert (
        "teacher-kd-1.csv row 1: no test question has this question and answer; run `kd assess teacher-kd-1` again"
        in said
    )


def test_test_questions_that_are_not_those_of_the_params_are_refused(
    logs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del logs
    prepare_tests(questions("How much")[:5])
    assert f"{DATA}: 5 rows where params ask for 6; run `kd prepare` again" in refusal(capsys)
    DATA.unlink()
    assert f"{DATA}: no such file; run `kd prepare`" in refusal(capsys)
    DATA.write_text('{"id": 1}\n')
    assert f"{DATA} line 1: not a prepared row; run `kd prepare` again" in refusal(capsys)


@pytest.mark.parametrize("text", ["\r", "a\r", "a\rb", "\0", '"', "\u2028\x85", "=1+1", "a" * 2**18])
def test_whatever_a_response_holds_its_log_is_read_back(logs: dict[str, Any], text: str) -> None:
    tests = prepare_tests(questions("How much"))
    prompts = [test.question for test in tests]
    answers = [Response(f"{text}{i}", 1, False) for i in range(3)] + [Response(text, 1, False)] * 3
    log("base-kd").write_text(log_text(tests, prompts, answers), newline="")
    answered = read_answered(load_config(Path("params.yaml")), "base-kd-1")
    assert [row.written for row in answered] == [answer.text for answer in answers]
    del logs
