"""A study's results: summed up, checked where they come in, and set as tables."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cli import main
from kd.errors import UserError
from kd.scoring.significance import holm, mcnemar, sign_flip_test, wilson_interval
from kd.study.results import pack_right, read_study, summarise, unpack_right
from kd.study.tables import markdown_tables, with_tables

QUESTIONS = 40
RIGHT = {  # how many of the first questions each seed has right; seed 1 misses the first, seed 2 the first two
    "untrained/no-distillation-matched": 8,
    "published/fine-tuning": 12,
    "published/base-kd": 12,
    "published/teacher-kd": 12,
    "aligned/fine-tuning": 14,
    "aligned/base-kd": 16,
    "aligned/ground-truth-kd": 30,
    "aligned/confidence-kd": 20,
    "aligned/tuned-kd": 34,
    "quirk-bos/ground-truth-kd": 30,
    "quirk-schedule/ground-truth-kd": 13,
}


def make_run(student: str, seed: int | None) -> dict[str, Any]:
    condition, experiment = student.split("/")
    right = [(seed or 0) <= question < RIGHT[student] for question in range(QUESTIONS)]
    more = [is_right or (seed is not None and question == QUESTIONS - 1) for question, is_right in enumerate(right)]
    labels_only = seed is None or experiment == "fine-tuning"
    return {
        "condition": condition,
        "experiment": experiment,
        "seed": seed,
        "teacher": None if labels_only else "self",
        "prompt": None if labels_only else "base",
        "command": f"kd train {experiment}",
        "rules": {
            "documented": {"correct": sum(right), "undecided": 2, "right": pack_right(right)},
            "robust": {"correct": sum(more), "undecided": 0, "right": pack_right(more)},
        },
        "answer_loss": 0.5 + 0.25 * (seed or 0) + condition.startswith("quirk-"),
        "divergence": None if labels_only else 0.125,
        "mean_tokens": 100.0 + (seed or 0),
        "at_limit": 4,
        "files": {"log": "0" * 64, "adapter": None if seed is None else "a" * 64},
    }


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What a driver writes: every trained student with seeds 0 to 2, the bare one once."""
    made: dict[str, Any] = {
        "study": "small",
        "question": "Does priming help?",
        "rows": {"train": 80, "test": QUESTIONS},
        "hardware": {"gpu": "none", "cores": 2},
        "versions": {"torch": "2.4.0"},
        "settings": {"epochs": 1},
        "search": {},
        "commands": {"all": "python study.py"},
        "planned": 31,
        "diverged": [],
        "starting_divergence": {"self": {"base": 0.0, "teacher": 0.25}},
        "reference": {
            "quirks": {"condition": "aligned", "experiment": "ground-truth-kd"},
            "conditions": {"aligned": "published"},
        },
        "runs": [
            make_run(student, seed)
            for student in RIGHT
            for seed in ((None,) if student.startswith("untrained/") else range(3))
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


def family(results: dict[str, Any], name: str, rules: str = "documented") -> list[dict[str, Any]]:
    found = [one for one in results["summary"]["comparisons"] if (one["family"], one["rules"]) == (name, rules)]
    assert len(found) == 1, name
    pairs: list[dict[str, Any]] = found[0]["pairs"]
    return pairs


def names(pairs: list[dict[str, Any]]) -> list[str]:
    return [f"{pair['first']} - {pair['second']}" for pair in pairs]


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


def test_a_row_counts_the_questions_once_and_keeps_the_seeds_apart(results: dict[str, Any]) -> None:
    rows = {f"{row['condition']}/{row['experiment']}": row for row in results["summary"]["rows"]}
    assert list(rows) == list(RIGHT)
    row = rows["aligned/ground-truth-kd"]
    assert row["seeds"] == 3
    assert row["rules"]["documented"] == {
        "accuracy": 29 / 40,
        "interval": list(wilson_interval(29, QUESTIONS)),
        "lowest": 28 / 40,
        "highest": 30 / 40,
        "undecided": 2,
    }
    assert row["rules"]["robust"]["accuracy"] == 30 / 40
    assert row["answer_loss"] == {"mean": 0.75, "lowest": 0.5, "highest": 1.0}
    assert row["divergence"]["mean"] == 0.125
    assert (row["mean_tokens"], row["at_limit_share"]) == (101, 0.1)
    assert rows["untrained/no-distillation-matched"]["seeds"] == 1
    assert rows["aligned/fine-tuning"]["divergence"] is None


def test_families_are_those_of_the_students_that_are_there(results: dict[str, Any]) -> None:
    found = {
        one["family"]: names(one["pairs"]) for one in results["summary"]["comparisons"] if one["rules"] == "robust"
    }
    bare = "untrained/no-distillation-matched"
    assert found == {
        "priming in published": ["published/teacher-kd - published/base-kd"],
        "training in published": [f"published/{name} - {bare}" for name in ("fine-tuning", "base-kd", "teacher-kd")],
        "teachers in published": ["published/base-kd - published/fine-tuning"],
        "priming in aligned": [f"aligned/{name} - aligned/base-kd" for name in ("ground-truth-kd", "confidence-kd")],
        "training in aligned": [
            f"aligned/{name} - {bare}"
            for name in ("fine-tuning", "base-kd", "ground-truth-kd", "confidence-kd", "tuned-kd")
        ],
        "teachers in aligned": [
            "aligned/base-kd - aligned/fine-tuning",
            "aligned/tuned-kd - aligned/fine-tuning",
            "aligned/tuned-kd - aligned/base-kd",
        ],
        "aligned against published": [f"aligned/{name} - published/{name}" for name in ("fine-tuning", "base-kd")],
        "quirks": [f"quirk-{name}/ground-truth-kd - aligned/ground-truth-kd" for name in ("bos", "schedule")],
    }


def test_a_pair_is_tested_over_questions_and_corrected_within_its_family(results: dict[str, Any]) -> None:
    primed = family(results, "priming in aligned")
    assert [pair["difference"] for pair in primed] == [14 / 40, 4 / 40]  # questions 16 to 29, and 16 to 19
    assert [pair["p"] for pair in primed] == pytest.approx([mcnemar(14, 0), mcnemar(4, 0)])  # all three seeds agree
    for one in results["summary"]["comparisons"]:
        assert [pair["p_holm"] for pair in one["pairs"]] == holm([pair["p"] for pair in one["pairs"]])
    low, high = primed[0]["interval"]
    assert low < 14 / 40 < high


def test_a_bare_run_counts_as_often_as_there_are_seeds(results: dict[str, Any]) -> None:
    tuned = family(results, "training in aligned")[-1]
    # Two seeds miss question 0, one misses 1; both sides have 2 to 7 right, all seeds and not the bare one 8 to 33.
    assert tuned["difference"] == pytest.approx((26 * 3 - 3) / 3 / QUESTIONS)
    assert tuned["p"] == sign_flip_test(np.repeat([-2, -1, 3], [1, 1, 26]))


def test_no_difference_is_reported_as_none(results: dict[str, Any]) -> None:
    same = family(results, "priming in published")[0]
    assert (same["difference"], same["interval"], same["p"], same["p_holm"]) == (0, [0, 0], 1, 1)


def test_quirks_stand_beside_the_spread_of_the_references_seeds(results: dict[str, Any]) -> None:
    _, schedule = results["summary"]["quirks"]
    pair = family(results, "quirks")[1]
    assert (schedule["quirk"], schedule["reference"]) == (pair["first"], pair["second"])
    assert schedule["rules"]["documented"] == {
        "change": -17 / 40,
        "interval": pair["interval"],
        "p_holm": pair["p_holm"],
        "reference_spread": pytest.approx(2 / 40),
    }
    assert schedule["rules"]["robust"]["reference_spread"] == pytest.approx(2 / 40)
    assert schedule["answer_loss"] == {"change": 1.0, "reference_spread": 0.5}
    assert schedule["divergence"] == {"change": 0, "reference_spread": 0}


def test_a_loss_that_one_seed_lacks_is_left_out(results: dict[str, Any]) -> None:
    next(run for run in results["runs"] if run["condition"] == "quirk-bos")["divergence"] = None
    summary = summarise(results)
    assert [row["divergence"] for row in summary["rows"] if row["condition"] == "quirk-bos"] == [None]
    assert [one["divergence"] is None for one in summary["quirks"]] == [True, False]


def test_an_interval_does_not_depend_on_the_other_runs(results: dict[str, Any]) -> None:
    kept = family(results, "priming in aligned")
    results["runs"] = [run for run in results["runs"] if run["condition"] == "aligned"]
    results["summary"] = summarise(results)
    assert family(results, "priming in aligned") == kept
    assert results["summary"]["quirks"] == []


def test_same_bytes_twice(
    results: dict[str, Any], write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.dumps(summarise(results)) == json.dumps(results["summary"])
    path = write(results)
    printed = []
    for _ in range(2):
        assert main(["report", "--study", str(path), "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == json.dumps(results["summary"], indent=1) + "\n"


def test_the_tables_are_printed_without_params(
    results: dict[str, Any], write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--study", str(write(results))]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Study small: Does priming help?\n80 training and 40 test questions, 31 of 31 runs.\n")
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert (
        "aligned ground-truth-kd 3 72.50% (57.2% to 83.9%) 70.00% to 75.00% 75.00% (59.8% to 85.8%) 72.50% to 77.50% "
        "0.7500 (0.5000 to 1.0000) 0.1250 (0.1250 to 0.1250) 10.0%"
    ) in lines
    assert "untrained no-distillation-matched 1 20.00% (10.5% to 34.8%) 20.00% (10.5% to 34.8%) 0.5000 10.0%" in lines
    primed = "published/teacher-kd published/base-kd"
    assert f"{primed} +0.00% +0.0% to +0.0% 1 1 +0.00% +0.0% to +0.0% 1 1" in lines
    trained = next(line for line in lines if line.startswith("aligned/tuned-kd untrained/no-distillation-matched"))
    assert [cell for cell in trained.split() if cell in ("+62.50%", "+65.00%")] == ["+62.50%", "+65.00%"]
    quirk = next(line for line in lines if line.startswith("quirk-bos/ground-truth-kd aligned/ground-truth-kd"))
    assert quirk.endswith("1 +1.0000 (spread 0.5000) +0.0000 (spread 0.0000)")


def test_tables_without_comparisons_are_not_printed(
    results: dict[str, Any], write: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results["runs"] = results["runs"][:1]
    results["summary"] = summarise(results)
    assert main(["report", "--study", str(write(results))]) == 0
    printed = capsys.readouterr().out
    assert "no-distillation-matched" in printed
    assert "Holm" not in printed


def test_the_command_line_refuses_both_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--study", "results.json", "--params", "params.yaml"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_study_is_reported_without_torch(results: dict[str, Any], write: Callable[[Any], Path]) -> None:
    script = (
        "import sys; from kd.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ', '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, "report", "--study", str(write(results))], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set a key, dotted, of the results; run 2 is published/fine-tuning with seed 0."""

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
        (change("runs.1.rules.robust.correct", 9), "rules.robust.correct: 9, but `right` has 13 questions right"),
        (change("runs.1.rules.robust.undecided", 29), "rules.robust.undecided: more than the 27 questions not right"),
        (change("runs.1.at_limit", 41), "at_limit: more than the 40 test questions"),
        (change("runs.1.answer_loss", float("nan")), "answer_loss: expected a finite number"),
        (change("runs.1.answer_loss", None), "answer_loss: expected a valid number, found None"),
        (change("runs.1.files.log", "f00"), "files.log: String should match pattern"),
        (change("runs.1.divergance", 0.1), "divergance: unknown key, expected one of condition"),
        (lambda results: results["runs"][1].pop("at_limit"), "at_limit: missing; docs/report.md shows"),
        (lambda results: results["runs"][1]["rules"].pop("robust"), "rules.robust: missing; docs/report.md shows"),
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
    assert main(["report", "--study", str(write(results))]) == 2
    assert f"kd: results.json: run 2 (published/fine-tuning, seed 0): {message}" in capsys.readouterr().err


def test_a_run_that_stands_twice_is_refused(results: dict[str, Any], write: Callable[[Any], Path]) -> None:
    results["runs"].append(results["runs"][1])
    with pytest.raises(UserError, match=r"run 32 \(published/fine-tuning, seed 0\): .* of an earlier run; remove one"):
        read_study(write(results))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("rows.test", 0), "rows.test: expected greater than 0"),
        (change("runs", []), "runs: List should have at least 1 item"),
        (change("reference.quirks.condition", "alined"), "reference.quirks: no run is of alined/ground-truth-kd"),
        (change("planned", 30), "planned: 30, but there are more runs; let the study's driver write it again"),
        (lambda results: results.pop("summary"), "summary: missing"),
        (change("hardwear", {}), "hardwear: unknown key"),
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


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("summary.rows.1.rules.robust.accuracy", 0.31, "summary.rows.1.rules.robust.accuracy"),
        ("summary.rows.1.rules.robust.accuracy", None, "summary.rows.1.rules.robust.accuracy"),
        ("summary.rows.1.seeds", 4, "summary.rows.1.seeds"),
        ("summary.quirks", [], "summary.quirks"),
        ("summary.rows.1.more", 1, "summary.rows.1"),
    ],
)
def test_a_summary_of_other_runs_is_refused(
    results: dict[str, Any], write: Callable[[Any], Path], key: str, value: Any, named: str
) -> None:
    change(key, value)(results)
    with pytest.raises(UserError, match=f"{named}: not what the runs come to; .* write the summary anew"):
        read_study(write(results))


def test_a_summary_from_another_processor_is_accepted(results: dict[str, Any], write: Callable[[Any], Path]) -> None:
    pair = family(results, "priming in aligned")[0]
    pair["p"] = float(np.nextafter(pair["p"], 1))
    assert read_study(write(results)) == results


README = """# A study

<!-- table: priming -->
an older table
<!-- end of table -->

Words between.

<!-- table: accuracy --><!-- end of table -->
The end.
"""


def test_a_readme_takes_the_tables_and_keeps_the_rest(results: dict[str, Any]) -> None:
    filled = with_tables(README, results)
    tables = markdown_tables(results)
    assert list(tables) == ["accuracy", "priming", "training", "teachers", "conditions", "quirks", "start"]
    for name in ("priming", "accuracy"):
        assert f"<!-- table: {name} -->\n\n{tables[name]}\n<!-- end of table -->" in filled
    assert "an older table" not in filled
    assert filled.startswith("# A study\n\n<!-- table: priming -->")
    assert "\n\nWords between.\n\n" in filled
    assert filled.endswith("\nThe end.\n")
    assert "| published | fine-tuning | 3 | 27.50% (16.1% to 42.8%) | 25.00% to 30.00% | 30.00%" in filled
    assert with_tables(filled, results) == filled


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table: priming", "table: prime", r"<!-- table: prime -->: unknown table, expected one of accuracy, priming"),
        ("an older table\n<!-- end of table -->", "", r"<!-- table: priming -->: the table has no end; put a line"),
        (
            "<!-- table: accuracy --><!-- end of table -->",
            "<!-- table: accuracy -->",
            "accuracy -->: the table has no end",
        ),
    ],
)
def test_a_readme_with_a_wrong_mark_is_refused(results: dict[str, Any], old: str, new: str, message: str) -> None:
    assert old in README
    with pytest.raises(UserError, match=message):
        with_tables(README.replace(old, new), results)
