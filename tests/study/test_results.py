"""A study's results: summed up, checked where they come in, and set as tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cli import main
from kd.errors import UserError
from kd.report.packed import pack_right, unpack_right
from kd.scoring.comparison import accuracy_interval, compare_family
from kd.study.results import read_study, summarise
from kd.study.tables import study_tables, with_tables

QUESTIONS = 40
RIGHT = {  # how many of the first questions each seed has right; seed 1 misses the first, seed 2 the first two
    "untrained/matched": 8,
    "rate/fine-tuning": 14,
    "rate/base-kd": 16,
    "rate/ground-truth-kd": 30,
    "quirk-bos/ground-truth-kd": 13,
}
PAIRS = {
    "training": [["rate/base-kd", "untrained/matched"], ["rate/ground-truth-kd", "untrained/matched"]],
    "quirks": [["quirk-bos/ground-truth-kd", "rate/ground-truth-kd"]],
}


def make_run(name: str, seed: int | None) -> dict[str, Any]:
    condition, student = name.split("/")
    right = [(seed or 0) <= question < RIGHT[name] for question in range(QUESTIONS)]
    more = [is_right or (seed is not None and question == QUESTIONS - 1) for question, is_right in enumerate(right)]
    labels_only = seed is None or student == "fine-tuning"
    made = {"commit": None, "changed": False, "versions": {"torch": "2.4.0"}, "gpus": [], "driver": None}
    return {
        "condition": condition,
        "student": student,
        "seed": seed,
        "teacher": None if labels_only else "self",
        "prompt": None if labels_only else "base",
        "command": f"kd study task small {name}",
        "diverged": False,
        "rules": {
            "documented": {"correct": sum(right), "undecided": 2, "right": pack_right(right)},
            "robust": {"correct": sum(more), "undecided": 0, "right": pack_right(more)},
        },
        "answer_loss": 1.0 if seed is None else 0.5 + 0.25 * seed,
        "divergence": None if labels_only else 0.125,
        "mean_tokens": 100.0 + (seed or 0),
        "at_limit": 4,
        "files": {"log": "0" * 64, "adapter": None if seed is None else "a" * 64},
        "made": {name: made | {"began": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:01:00+00:00"}},
    }


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What `kd study results` writes: every trained student with seeds 0 to 2, the bare one once."""
    made: dict[str, Any] = {
        "study": "small",
        "question": "Does priming help?",
        "questions": {name: {"question": f"What of {name}?", "pairs": pairs} for name, pairs in PAIRS.items()},
        "margin": 0.05,
        "control": "untrained/matched",
        "rows": {"train": 80, "test": QUESTIONS},
        "settings": {"rate": {"epochs": 1}},
        "teachers": {},
        "searches": {},
        "commands": {"run": "kd study run studies/small"},
        "planned": 13,
        "runs": [
            make_run(name, seed) for name in RIGHT for seed in ((None,) if name == "untrained/matched" else range(3))
        ],
    }
    return made | {"summary": summarise(made)}


@pytest.fixture
def results(written: dict[str, Any]) -> dict[str, Any]:
    """The same, to be changed."""
    return copy.deepcopy(written)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Write a results file in a folder that has no params.yaml and is the working folder."""
    monkeypatch.chdir(tmp_path)

    def write_results(document: Any) -> Path:
        path = Path("results.json")
        path.write_text(json.dumps(document))
        return path

    return write_results


@given(st.lists(st.booleans(), max_size=30))
def test_packed_questions_unpack_to_themselves(right: list[bool]) -> None:
    assert unpack_right(pack_right(right), len(right)) == right


def test_the_first_question_is_the_most_significant_bit() -> None:
    assert pack_right([True, False, False, False, True]) == "88"
    assert pack_right([False, True, True]) == "6"
    assert len(pack_right([True] * 1319)) == 330


@pytest.mark.parametrize("digits", ["", "8", "888", "84", "8 8", "8g", "F8"])
def test_digits_that_are_not_those_of_so_many_questions_are_refused(digits: str) -> None:
    with pytest.raises(ValueError, match="expected 2 lower-case hexadecimal digits for 5 questions"):
        unpack_right(digits, 5)


def as_array(name: str) -> Any:
    runs = [[seed <= question < RIGHT[name] for question in range(QUESTIONS)] for seed in range(3)]
    return np.array(runs) if name != "untrained/matched" else np.array(runs[0])


def test_a_student_has_its_seeds_mean_and_how_far_they_lie_apart(results: dict[str, Any]) -> None:
    students = results["summary"]["students"]
    assert list(students) == list(RIGHT)
    student = students["rate/ground-truth-kd"]
    assert (student["trained"], student["seeds"]) == (True, 3)
    assert student["documented"] == {
        "accuracy": pytest.approx(29 / 40),
        "interval": list(accuracy_interval(as_array("rate/ground-truth-kd"))),
        "lowest": 28 / 40,
        "highest": 30 / 40,
    }
    assert student["robust"]["accuracy"] == pytest.approx(30 / 40)
    assert student["answer_loss"] == {"mean": 0.75, "lowest": 0.5, "highest": 1.0}
    assert (student["mean_tokens"]["mean"], student["at_limit"]) == (101, pytest.approx(0.1))
    assert students["untrained/matched"]["seeds"] == 1
    assert students["rate/fine-tuning"]["divergence"] is None


def test_a_question_is_one_family_of_tests_over_seeds_and_questions(results: dict[str, Any]) -> None:
    right = {name: as_array(name) for name in RIGHT}
    for question, pairs in PAIRS.items():
        expected = compare_family([(first, second) for first, second in pairs], right)
        found = results["summary"]["comparisons"][question]["documented"]
        assert list(found) == [f"{first} - {second}" for first, second in pairs]
        for (first, second), one in expected.items():
            pair = found[f"{first} - {second}"]
            assert (pair["difference"], pair["p"], pair["p_holm"]) == (one.difference, one.p, one.p_holm)
            assert (pair["detectable"], pair["equivalent"]) == (one.detectable, one.excludes(0.05))


def test_pairs_that_are_not_there_yet_are_left_out(results: dict[str, Any]) -> None:
    results["runs"] = [run for run in results["runs"] if run["condition"] != "quirk-bos"]
    assert summarise(results)["comparisons"]["quirks"] == {"documented": {}, "robust": {}}


def test_a_student_that_training_left_worse_has_collapsed(results: dict[str, Any]) -> None:
    diverged, worse = (run for run in results["runs"] if run["condition"] == "quirk-bos" and run["seed"])
    diverged |= {"diverged": True, **dict.fromkeys(("answer_loss", "divergence", "mean_tokens", "at_limit"))}
    worse["answer_loss"] = 1.11
    student = summarise(results)["students"]["quirk-bos/ground-truth-kd"]
    assert student["collapsed"] == [1, 2]
    assert student["answer_loss"] == {"mean": pytest.approx(0.805), "lowest": 0.5, "highest": 1.11}


def test_the_tables_are_printed_without_params_the_same_twice(
    results: dict[str, Any], write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write(results)
    assert main(["study", "tables", "."]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Study small: Does priming help?\n80 training and 40 test questions, 13 of 13 runs.\n")
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert any(line.startswith("rate/ground-truth-kd 3 72.5% (") for line in lines)
    assert any(line.startswith("quirk-bos/ground-truth-kd - rate/ground-truth-kd -42.5 ") for line in lines)
    for _ in range(2):
        assert main(["study", "tables", ".", "--json"]) == 0
        assert capsys.readouterr().out == json.dumps(results["summary"], indent=1) + "\n"


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a key, dotted, of the results; run 2 is rate/fine-tuning with seed 0."""

    def change_results(results: Any) -> None:
        *parts, last = key.split(".")
        for part in parts:
            results = results[int(part) if part.isdecimal() else part]
        results[last] = value

    return change_results


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("runs.1.rules.robust.right", "ff"), "rules.robust.right: expected 10 lower-case hexadecimal digits"),
        (change("runs.1.rules.robust.correct", 9), "rules.robust.correct: 9, but `right` has 15 questions right"),
        (change("runs.1.rules.robust.undecided", 29), "rules.robust.undecided: more than the 25 questions not right"),
        (change("runs.1.at_limit", 41), "at_limit: more than the 40 test questions"),
        (change("runs.1.answer_loss", float("nan")), "answer_loss: expected a finite number"),
        (change("runs.1.files.log", "f00"), "files.log: String should match pattern"),
        (change("runs.1.divergance", 0.1), "divergance: unknown key, expected one of condition"),
        (lambda results: results["runs"][1].pop("made"), "made: missing; docs/study.md shows"),
        (lambda results: results["runs"][1]["rules"].pop("robust"), "rules.robust: missing; docs/study.md shows"),
    ],
)
def test_a_bad_run_is_named(
    results: dict[str, Any],
    write: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    spoil(results)
    write(results)
    assert main(["study", "tables", "."]) == 2
    assert f"kd: results.json: run 2 (rate/fine-tuning, seed 0): {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("rows.test", 0), "rows.test: expected greater than 0"),
        (change("runs", []), "runs: List should have at least 1 item"),
        (change("planned", 12), "planned: 12, but there are more runs; let `kd study results` write it again"),
        (lambda results: results["runs"].append(results["runs"][1]), "run 14 (rate/fine-tuning, seed 0): condition,"),
        (lambda results: results.pop("summary"), "summary: missing"),
        (change("hardwear", {}), "hardwear: unknown key"),
        (
            change("summary.students.rate/base-kd.robust.accuracy", 0.31),
            "summary.students.rate/base-kd.robust.accuracy",
        ),
        (change("summary.students.rate/base-kd.collapsed", [1]), "summary.students.rate/base-kd.collapsed: not what"),
        (
            change("summary.comparisons.quirks.robust", {}),
            "summary.comparisons.quirks.robust: not what the runs",
        ),
    ],
)
def test_a_bad_file_is_named(
    results: dict[str, Any],
    write: Callable[[Any], Path],
    spoil: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    spoil(results)
    with pytest.raises(UserError) as refused:
        read_study(write(results))
    assert str(refused.value).startswith(f"results.json: {message}")


def test_a_file_that_is_no_study_is_refused(write: Callable[[Any], Path]) -> None:
    with pytest.raises(UserError, match="expected a mapping of keys"):
        read_study(write([]))
    with pytest.raises(UserError, match=r"nowhere.json: no such file; it should hold a study's results"):
        read_study(Path("nowhere.json"))


def test_a_summary_from_another_processor_is_accepted(results: dict[str, Any], write: Callable[[Any], Path]) -> None:
    pair = next(iter(results["summary"]["comparisons"]["quirks"]["robust"].values()))
    pair["p"] = float(np.nextafter(pair["p"], 1))
    assert read_study(write(results)) == results


README = """# A study

<!-- table: quirks -->
an older table
<!-- end of table -->

Words between.

<!-- table: students --><!-- end of table -->
The end.
"""


def test_a_readme_takes_the_tables_and_keeps_the_rest(results: dict[str, Any]) -> None:
    filled = with_tables(README, results, "README.md")
    assert list(study_tables(results)) == ["students", "training", "quirks"]
    assert "an older table" not in filled
    assert filled.startswith("# A study\n\n<!-- table: quirks -->\n\n| First - second | Points |")
    assert "\n\nWords between.\n\n" in filled
    assert filled.endswith("\nThe end.\n")
    assert "| rate/base-kd | 3 | 37.5% (" in filled
    assert with_tables(filled, results, "README.md") == filled


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table: quirks", "table: quirk", r"<!-- table: quirk -->: unknown table, expected one of students, training"),
        ("an older table\n<!-- end of table -->", "", r"<!-- table: quirks -->: the table has no end; put a line"),
        ("<!-- table: students --><!-- end of table -->", "<!-- table: students -->", "students -->: the table has no"),
    ],
)
def test_a_readme_with_a_wrong_mark_is_refused(results: dict[str, Any], old: str, new: str, message: str) -> None:
    assert old in README
    with pytest.raises(UserError, match=message):
        with_tables(README.replace(old, new), results, "README.md")
