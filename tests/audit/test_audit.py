"""The audit of the published logs: every figure of the paper that its own rows give or do not give."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import shutil
import zlib
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest

from kd.audit.logs import LOGS, TRUTH
from kd.cli import main

AUTOMATIC = {
    "no-distillation": 1284,
    "fine-tuning": 1185,
    "base-kd": 1181,
    "teacher-kd": 1200,
    "ground-truth-kd": 1194,
}


@pytest.fixture(scope="module")
def audited(published_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kd audit --json` prints, and the tables beside it."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(tmp_path_factory.mktemp("audit"))
        assert main(["audit", "--data", str(published_logs), "--json", "--output", "out"]) == 0
        written = json.loads(Path("out/audit.json").read_text())
        tables, page = Path("out/audit.txt").read_text(), Path("out/index.html").read_text()
        charts = sorted(path.name for path in Path("out").glob("*.*g"))
    document: dict[str, Any] = json.loads(out.getvalue())  # one document and nothing else
    assert document == written
    return document | {"tables": tables, "page": page, "charts": charts}


def test_notebook_rules_repeat_every_automatic_decision(audited: dict[str, Any]) -> None:
    for name, rows in AUTOMATIC.items():
        result = audited["experiments"][name]
        assert (result["n"], result["automatic"], result["manual"]) == (1319, rows, 1319 - rows)
        assert result["automatic_mismatches"] == 0
    assert sum(AUTOMATIC.values()) == 6044


def test_published_counts_come_out_of_the_rows(audited: dict[str, Any]) -> None:
    recomputed = {name: result["recomputed_correct"] for name, result in audited["experiments"].items()}
    assert recomputed == {
        "no-distillation": 161,
        "fine-tuning": 303,
        "base-kd": 404,
        "confidence-kd": 454,  # by the automatic rules alone: the hand decisions were not published
        "teacher-kd": 558,
        "ground-truth-kd": 635,
    }
    for name in AUTOMATIC:
        assert recomputed[name] == audited["experiments"][name]["published_correct"]


def test_rows_and_precision_of_single_rules(audited: dict[str, Any]) -> None:
    students = {name: e["rules"] for name, e in audited["experiments"].items() if name != "no-distillation"}
    assert sorted(rules["boxed"]["rows"] for rules in students.values()) == [258, 408, 473, 555, 659]
    assert all(0.70 <= r["boxed"]["correct"] / r["boxed"]["rows"] <= 0.82 for r in students.values())
    assert {(r["first-line"]["rows"], r["first-line"]["correct"]) for r in students.values()} == {
        (192, 5),
        (152, 4),
        (145, 0),
        (117, 3),
        (106, 3),
    }


def test_findings_and_statistics_are_stated(audited: dict[str, Any]) -> None:
    findings = {finding["number"]: finding["text"] for finding in audited["findings"]}
    assert list(findings) == [1, 2, 3, 4, 9, 13, 14]
    assert "22.97%" in findings[1]
    assert "between 454 and 640" in findings[2]
    assert "1 (Question 1)" in findings[4]
    assert len(audited["comparisons"]) == 15
    assert all(pair["p"] <= pair["p_holm"] <= 1 for pair in audited["comparisons"])
    assert all(published for published in audited["data"].values())
    for name in audited["experiments"]:
        assert name in audited["tables"]


def test_the_page_holds_tables_charts_findings_and_every_response(audited: dict[str, Any]) -> None:
    page = audited["page"]
    assert len(page) <= 8_000_000
    assert all(escape(finding["text"]) in page for finding in audited["findings"])
    names = ("accuracy", "agreement", "length", "rule-sets")
    assert audited["charts"] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(f"<figure id=chart-{name}>" in page for name in names)
    packed = page.partition('id="packed">')[2].partition("<")[0]
    rows = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert (len(rows["questions"]), rows["experiments"]) == (1319, list(audited["experiments"]))
    as_published = {name: one["verdicts"].count("r") for name, one in zip(LOGS, rows["readings"][0], strict=True)}
    assert as_published == {name: one["recomputed_correct"] for name, one in audited["experiments"].items()}
    for readings in rows["readings"][1:]:
        for one in readings:
            assert [answer is None for answer in one["answers"]] == [span is None for span in one["spans"]]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    """Write a small folder in the published format; the returned function changes one file before it is audited."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for file in [TRUTH, *LOGS.values()]:
        rows = [
            {
                "question": f"How many are {i} and 2?",
                "answer": f"They are {i + 2}.\n#### {i + 2}",
                "extracted_answer": f"{i + 2}.0",
                "model_answer": f"{i} + 2 = {i + 2}, {i}\nso \\boxed{{{i + 2}}}",
                "model_output_tokens": "20",
                "model_max_tokens": "False",
                "model_ex1": f"{i + 2}.0",
            }
            for i in range(1, 5)
        ]
        write(data / file, rows)

    def change(file: str, edit: Callable[[list[dict[str, str]]], object]) -> None:
        with (data / file).open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        edit(rows)
        write(data / file, rows)

    return change


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.usefixtures("small")
def test_other_logs_in_the_same_format_are_audited_and_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--data", "data"]) == 0
    out = capsys.readouterr().out
    assert "Not as published" in out
    assert "4 100.00%" in out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.pop(), "3 rows where the test set"),
        (lambda rows: rows[2].update(question="Else?"), "row 3: another question"),
        (lambda rows: rows[1].update(model_ex1="many"), "row 2: model_ex1 is 'many', expected a number"),
        (lambda rows: [row.pop("model_answer") for row in rows], "no column 'model_answer'"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(
    small: Callable[..., None], capsys: pytest.CaptureFixture[str], edit: Callable[[Any], object], message: str
) -> None:
    small("base-KD.csv", edit)
    assert main(["audit", "--data", "data"]) == 2
    error = capsys.readouterr().err
    assert "base-KD.csv" in error
    assert message in error


@pytest.mark.usefixtures("small")
def test_a_malformed_csv_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/teacher-KD.csv")
    path.write_text(path.read_text() + '"an open quote\n')
    assert main(["audit", "--data", "data"]) == 2
    assert "teacher-KD.csv row 5: not readable as CSV" in capsys.readouterr().err
    shutil.rmtree("data")
    assert main(["audit", "--data", "data"]) == 2
    assert "kd data fetch" in capsys.readouterr().err
