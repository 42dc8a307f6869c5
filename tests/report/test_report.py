"""The report: its numbers, its table, its chart."""

from __future__ import annotations

import base64
import csv
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from params import keep, run_of
from rows import prepare_tests
from ruamel.yaml import YAML

from kd.cli import main
from kd.config import Config, load_config
from kd.io.files import sha256
from kd.report.reading import Run, read_runs
from kd.report.results import collect
from kd.report.tables import markdown
from kd.scoring.log import COLUMNS
from kd.scoring.review import response_sha256

REPORT = Path("artifacts/mini/report")
STUDENTS = "no-distillation fine-tuning base-kd confidence-kd teacher-kd ground-truth-kd".split()
STUDENTS.append("no-distillation-matched")


@pytest.fixture
def logs(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Six rows a log: student number i has the first i right, but for the last row, that no rule settles."""
    write_params(tiny_params)
    prepare_tests((f"How many are {i} and 2?", f"They are {i + 2}.\n#### {i + 2}") for i in range(6))
    folder = Path("artifacts/mini/logs")
    folder.mkdir(parents=True)
    suffixes = {name: one.suffix for name, one in load_config(Path("params.yaml")).experiments.items()}
    for right, experiment in enumerate(STUDENTS):
        with (folder / f"{run_of(experiment)}.csv").open("w", newline="") as file:
            suffix = suffixes[run_of(experiment)]
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for i in range(6):
                question, answer = f"How many are {i} and 2?", i + 2 if i < right else 99
                response = "They are many." if i == 5 else f"They are \\boxed{{{answer}}}"
                writer.writerow(
                    {
                        "question": question,
                        "answer": f"They are {i + 2}.\n#### {i + 2}",
                        "model_answer": f"{question}{suffix} {response}",
                        "model_output_tokens": 5 + i,
                        "model_max_tokens": i == 4,
                        "extracted_answer": -1 if i == 5 else answer,
                        "rule": "undecided" if i == 5 else "boxed",
                        "correct": i < min(right, 5),
                    }
                )
    return tiny_params


def reported() -> dict[str, Any]:
    """The results that `kd report` writes, without its charts and its page."""
    config = load_config(Path("params.yaml"))
    document: dict[str, Any] = json.loads(json.dumps(collect(config, read_runs(config))))
    return document


@pytest.mark.usefixtures("logs")
def test_results_hold_counts_intervals_and_comparisons() -> None:
    results = reported()
    assert list(results["experiments"]) == list(load_config(Path("params.yaml")).runs)
    assert set(results["experiments"]) == set(STUDENTS)
    row = results["experiments"]["confidence-kd"]
    (run,) = row["runs"]
    assert (row["rows"], row["accuracy"], row["lowest"], row["highest"], row["collapsed"]) == (6, 0.5, 0.5, 0.5, [])
    assert (run["name"], run["seed"], run["correct"], run["undecided"]) == ("confidence-kd-1", 1, 3, [6])
    assert row["published_accuracy"] is None  # the miniature is not the paper's experiment
    assert row["interval"] == pytest.approx([0.1876, 0.8124], abs=1e-4)
    assert len(results["comparisons"]) == 21
    pairs = {(pair["first"], pair["second"]): pair for pair in results["comparisons"]}
    first = pairs["no-distillation", "fine-tuning"]
    assert (first["only_first"], first["only_second"], first["p"], first["p_holm"]) == (0, 1, 1, 1)
    against = row["against_control"]
    assert (against["only_first"], against["only_second"], against["asked_alike"]) == (0, 2, True)
    assert (against["p"], against["p_holm"], against["covers_seeds"]) == (0.5, 1, False)
    assert (against["excluded"], results["margin"], results["seeds"]) == (False, 0.05, [1])
    assert against["detectable"] > 1  # six questions cannot tell six students apart
    assert results["control"] == STUDENTS[-1]
    assert results["experiments"]["no-distillation-matched"]["against_control"] is None
    assert not results["experiments"]["no-distillation"]["against_control"]["asked_alike"]


@pytest.mark.usefixtures("logs")
def test_the_table_is_printed_and_written_and_the_results_the_same_bytes_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == reported() == json.loads((REPORT / "results.json").read_text())
    before = {path.name: path.read_bytes() for path in REPORT.iterdir()}
    assert main(["report"]) == 0
    assert {path.name: path.read_bytes() for path in REPORT.iterdir()} == before
    shown, printed, notes, pairs = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert shown[0].startswith("None of the five trained students is shown to differ from the untrained one asked")
    header = ["Experiment", "Accuracy", "95 % interval", "Correct", "Against control", "Detectable"]
    assert re.split("  +", printed[0]) == header
    rows = {line.split()[0]: re.split("  +", line)[1:] for line in printed}
    assert rows["no-distillation-matched"] == ["83.33%", "43.6% to 97.0%", "5/6", "the control"]
    assert rows["fine-tuning"][-2:] == ["-66.7, no difference shown", "none"]
    assert max(map(len, [*shown, *printed, *notes])) <= 120
    assert "over the 6 comparisons" in " ".join(notes)
    assert "One seed: intervals and tests are over the questions alone and say nothing of other seeds." in notes
    assert "Asked in another way than the control: no-distillation." in notes
    assert notes[-2].startswith("No rule settles, so they count as wrong until `kd review` decides them: no-dist")
    assert ["base-kd", "ground-truth-kd", "-50.00%"] in [pair.split()[:3] for pair in pairs]
    text = (REPORT / "results.md").read_text()
    assert "| ground-truth-kd | 83.33% | 43.6% to 97.0% | 5/6 | +0.0, no difference shown | none |" in text
    assert "| no-distillation | fine-tuning | -16.67% |" in text
    assert "- base-kd: 6" in text
    assert (REPORT / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("logs")
def test_the_teachers_certainty_stands_behind_the_table_where_it_was_measured() -> None:
    assert "The teacher behind each prompt" not in markdown(reported())
    one = {
        "mean_max_probability": 0.57312,
        "positions": 900,
        "questions": 7,
        "versions": {"torch": "2.4.0"},
    }
    Path("artifacts/mini/statistics.json").write_text(json.dumps({"base": one}))
    assert "| base | 0.5731 | 900 of 7 questions |\n" in markdown(reported())
    assert reported()["prompts"] == {"base": one | {"published": None}}


@pytest.mark.usefixtures("logs")
def test_the_page_counts_what_the_table_counts_and_shows_its_files_and_the_params_that_make_it_again() -> None:
    decided = ("row", "question", "sha256", "answer")
    question, response = "How many are 5 and 2?", "They are many."
    Path("reviews").mkdir()
    with Path("reviews/teacher-kd-1.csv").open("w", newline="") as file:
        csv.writer(file).writerows([decided, (6, question, response_sha256(question, response), 7)])
    assert main(["report"]) == 0
    page = (REPORT / "index.html").read_text()
    assert sha256(Path("artifacts/mini/logs/teacher-kd-1.csv")) in page
    assert "distill.lora.rank" in page
    stages = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for key in stages["report"]["params"]:
        assert re.search(rf"<th scope=row>{key}\b", page), key
    assert "chart-loss" not in page  # no adapter is here
    rows = json.loads(zlib.decompress(base64.b64decode(page.partition('id="packed">')[2].partition("<")[0])))
    counted = dict(zip(rows["experiments"], rows["readings"][0], strict=True))
    results = json.loads((REPORT / "results.json").read_text())["experiments"]
    for result in results.values():
        assert counted[result["runs"][0]["name"]]["verdicts"].count("r") == result["runs"][0]["correct"]
    teacher = counted["teacher-kd-1"]
    assert (teacher["answers"][5], rows["rules"][teacher["rules"][5]], teacher["verdicts"]) == (
        "7",
        "by-hand",
        "rrrrwr",
    )
    response = rows["responses"][0][rows["experiments"].index("teacher-kd-1")]
    assert response[slice(*teacher["spans"][0])] == teacher["answers"][0] == "2"


def test_a_profile_without_a_control_says_what_is_missing(
    logs: dict[str, Any], write_params: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(logs, "base-kd")
    write_params(logs)
    assert main(["report"]) == 0
    said = capsys.readouterr().out
    assert "The trained student, base-kd, answers 2 of 6 test questions right; no untrained student" in said
    assert "Against control" not in said


@pytest.mark.usefixtures("logs")
def test_a_missing_log_says_which_command_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("artifacts/mini/logs/teacher-kd-1.csv").unlink()
    assert main(["report"]) == 2
    assert "run `kd assess teacher-kd-1`" in capsys.readouterr().err


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("correct", "right", "no column 'correct'"),
        ("True", "True\nx", "teacher-kd-1.csv row 2: not as many cells"),
        ("undecided", '"undecided', "teacher-kd-1.csv row 6: not readable as CSV"),
    ],
)
def test_an_unusable_log_is_refused(capsys: pytest.CaptureFixture[str], old: str, new: str, message: str) -> None:
    path = Path("artifacts/mini/logs/teacher-kd-1.csv")
    path.write_text(path.read_text().replace(old, new, 1))
    assert main(["report"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("logs")
def test_a_log_with_too_few_rows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("artifacts/mini/logs/teacher-kd-1.csv")
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")  # an answer has two lines
    assert main(["report"]) == 2
    assert "5 rows where the test set has 6; run `kd assess teacher-kd-1` again" in capsys.readouterr().err


@pytest.mark.usefixtures("logs")
def test_check_losses_stand_behind_the_table() -> None:
    adapter = Path("artifacts/mini/adapters/teacher-kd-1")
    adapter.mkdir(parents=True)
    (adapter / "check.json").write_text('{"check_loss": 9.8765, "rows": 6, "versions": {"torch": "2.4.0"}}')
    results = reported()
    assert results["check_losses"] == {"teacher-kd": {"check_loss": 9.8765, "published": None}}
    assert results["versions"]["training"] == {"teacher-kd-1": {"torch": "2.4.0"}}
    assert "| teacher-kd | 9.877 |\n" in markdown(results)


@pytest.mark.usefixtures("logs")
def test_a_student_that_collapsed_stays_in_the_table_and_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    for name, losses in (("base-kd", [2.0] * 10 + [9.0] * 20), ("teacher-kd", [9.0] * 10 + [2.0] * 20)):
        lose(name, losses)
    for name in ("base-kd", "confidence-kd", "no-distillation"):
        always_at_the_limit(name)
    assert main(["report"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\nbase-kd +33.33%\* .*  -50.0\*, no .*  collapsed: loss rose, never stops\n", printed)
    assert re.search(r"\nconfidence-kd .*  collapsed: never stops\n", printed)
    assert re.search(r"\nno-distillation +0.00%  .*  -83.3, .*  never stops\n", printed)  # nobody trained it
    assert re.search(r"\nbase-kd +teacher-kd +-33.33%\* ", printed)
    assert "\nFigures with * hang on a student that collapsed: base-kd, confidence-kd.\n" in printed
    assert "base-kd and confidence-kd collapsed." in " ".join(printed.split())
    results = json.loads((REPORT / "results.json").read_text())["experiments"]
    limit = {"by": "limit", "rows": 6}
    assert results["base-kd"]["runs"][0]["signs"] == [{"by": "loss", "first": 2.0, "last": 9.0}, limit]
    assert results["confidence-kd"]["runs"][0]["signs"] == results["no-distillation"]["runs"][0]["signs"] == [limit]
    assert [results[name]["collapsed"] for name in STUDENTS[:5]] == [[], [], [1], [1], []]
    assert results["teacher-kd"]["runs"][0]["loss"] == {"first": 9.0, "last": 2.0, "rose": False}
    page = (REPORT / "index.html").read_text()
    for text in (page, (REPORT / "results.md").read_text()):
        assert "its training loss rose from 2 to 9; 6 of 6 responses ran into the limit" in text
    assert ">collapsed, 33.3%</text>" in page
    assert (REPORT / "losses/base-kd-1.tsv").read_text().splitlines()[:2] == ["step\tloss", "0\t2.0"]


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize("row", ["3\tnan", "3\tx", "x\t2.0"])
def test_an_unusable_loss_curve_is_refused(capsys: pytest.CaptureFixture[str], row: str) -> None:
    lose("base-kd", [2.0] * 3)
    with Path("artifacts/mini/adapters/base-kd-1/loss/plots/metrics/loss.tsv").open("a") as file:
        file.write(row + "\n")
    assert main(["report"]) == 2
    said = capsys.readouterr().err
    assert "loss.tsv row 4: " in said
    assert "run `kd train base-kd-1` again" in said


@pytest.mark.usefixtures("logs")
def test_a_loss_curve_without_updates_is_none() -> None:
    lose("base-kd", [])
    assert reported()["experiments"]["base-kd"]["runs"][0]["loss"] is None


@pytest.fixture
def three_seeds(logs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trained student with two seeds more: one that has the same right, and one that has none and never stops."""
    del logs
    lose("base-kd", [9.0] * 10 + [2.0] * 20)

    def read(config: Config) -> dict[str, list[Run]]:
        def seeds(name: str, run: Run) -> list[Run]:
            if run.seed is None:
                return [run]
            lost = [replace(row, taken="99", rule="boxed", reached_limit=True) for row in run.rows]
            one, two, three = (replace(run, name=f"{name}-{seed}", seed=seed) for seed in (1, 2, 3))
            return [one, two, replace(three, rows=lost, check={"check_loss": 5.0, "versions": {}})]

        return {name: seeds(name, run) for name, (run,) in read_runs(config).items()}

    monkeypatch.setattr("kd.report.run.read_runs", read)


@pytest.mark.usefixtures("three_seeds")
def test_several_seeds_are_averaged_and_those_that_collapsed_named_beside_every_figure_and_each_is_on_the_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report"]) == 0
    shown, table, notes, pairs = capsys.readouterr().out.split("\n\n")
    assert "base-kd (1 of 3 seeds), confidence-kd (1 of 3 seeds)" in " ".join(shown.split())
    lines = {line.split()[0]: re.split("  +", line) for line in table.splitlines()}
    header = ["Experiment", "Accuracy", "95 % interval", "Seeds", "Against control", "Detectable", "Mark"]
    assert lines["Experiment"] == header
    name, accuracy, _, seeds, against, detectable, mark = lines["ground-truth-kd"]
    assert (name, accuracy, seeds) == ("ground-truth-kd", "55.56%*", "0.0% to 83.3% (3)")
    assert (against, detectable) == ("-27.8*, no difference shown", "none")
    assert mark == "1 of 3 seeds collapsed: never stops"
    assert lines["no-distillation"][3] == "none"
    assert "p of a t-test over seeds and questions after Holm's" in " ".join(notes.split())
    assert "Figures with * hang on a student that collapsed: fine-tuning (1 of 3 seeds), " in " ".join(notes.split())
    assert "ground-truth-kd (seed 3), collapsed: 6 of 6 responses ran into the limit." in notes
    assert "One seed" not in notes
    assert re.search(r"\nfine-tuning +base-kd +-11.11%\* ", pairs)

    results = json.loads((REPORT / "results.json").read_text())
    one = results["experiments"]["ground-truth-kd"]
    assert (one["lowest"], one["highest"], one["collapsed"]) == (0, 5 / 6, [3])
    assert one["accuracy"] == pytest.approx(5 / 9)
    assert [(run["name"], run["seed"], run["accuracy"]) for run in one["runs"]] == [
        ("ground-truth-kd-1", 1, 5 / 6),
        ("ground-truth-kd-2", 2, 5 / 6),
        ("ground-truth-kd-3", 3, 0),
    ]
    assert one["interval"][0] < 0.1
    assert one["against_control"]["covers_seeds"] is True
    assert results["seeds"] == [1, 2, 3]
    assert results["check_losses"]["base-kd"] == {"check_loss": 5.0, "published": None}

    page = (REPORT / "index.html").read_text()
    assert ", seeds 1, 2 and 3;" in page
    assert ">1 of 3 seeds collapsed</text>" in page
    assert page.count("; * collapsed: fine-tuning (1 of 3 seeds), ") == 4 + 2  # charts; the pairs' caption and label
    assert ">ground-truth-kd*</text>" in page
    rows = json.loads(zlib.decompress(base64.b64decode(page.partition('id="packed">')[2].partition("<")[0])))
    assert rows["experiments"].count("base-kd-3") == 1
    assert len(rows["experiments"]) == len(rows["readings"][0]) == 2 + 5 * 3
    text = (REPORT / "results.md").read_text()
    assert "| base-kd | 3 | 0.00% | 0/6 | collapsed: never stops |" in text
    assert "| no-distillation | none | 0.00% | 0/6 |  |" in text
    assert sorted(path.name for path in (REPORT / "losses").iterdir()) == [f"base-kd-{seed}.tsv" for seed in (1, 2, 3)]


def lose(name: str, losses: list[float]) -> None:
    """The loss curve that training leaves."""
    folder = Path("artifacts/mini/adapters", run_of(name), "loss/plots/metrics")
    folder.mkdir(parents=True)
    (folder / "loss.tsv").write_text("step\tloss\n" + "".join(f"{i}\t{loss}\n" for i, loss in enumerate(losses)))


def always_at_the_limit(name: str) -> None:
    path = Path(f"artifacts/mini/logs/{run_of(name)}.csv")
    with path.open(newline="") as file:
        rows = [row | {"model_max_tokens": "True"} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
