"""The studies that were run: their pages say what their results.json says, and every figure there has its key."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from matplotlib import style

from kd.cli import main
from kd.report.figures import fill, unbound
from kd.study.plan import Plan
from kd.study.results import read_study
from kd.study.tables import with_tables

STUDIES = sorted(path.parent for path in REPOSITORY.glob("studies/*/README.md"))
DONE = [folder for folder in STUDIES if (folder / "results.json").exists()]
FIGURE = re.compile(r"([^\s(]+)<!-- [^:]+:\S+ -->")


def name(folder: Path) -> str:
    return folder.name


@pytest.mark.parametrize("folder", DONE, ids=name)
def test_a_readme_says_what_results_json_says(folder: Path) -> None:
    results, readme = read_study(folder / "results.json"), (folder / "README.md").read_text(encoding="utf-8")
    assert fill(with_tables(readme, results, "README.md"), results, "README.md") == readme
    for found in FIGURE.finditer(readme):  # change any one, and the above does not hold
        start, end = found.span(1)
        digit = next(place for place in range(start, end) if readme[place].isdigit())
        spoiled = f"{readme[:digit]}{(int(readme[digit]) + 1) % 10}{readme[digit + 1 :]}"
        assert fill(spoiled, results, "README.md") == readme


@pytest.mark.parametrize("folder", STUDIES, ids=name)
def test_no_figure_in_a_readme_is_without_a_key(folder: Path) -> None:
    assert unbound((folder / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", DONE, ids=name)
def test_results_are_small_and_logs_are_not_in_git(folder: Path) -> None:
    assert (folder / "results.json").stat().st_size <= 2_000_000
    assert (folder / "logs.dvc").exists()
    kept = subprocess.run(["git", "ls-files", "logs"], cwd=folder, capture_output=True, text=True, check=False)
    assert kept.stdout == ""


def test_the_tables_of_a_study_are_printed_and_its_page_stays(capsys: pytest.CaptureFixture[str]) -> None:
    page = {path: path.read_bytes() for path in (DONE[0] / "README.md", *DONE[0].glob("*.svg"))}
    assert len(page) == 3
    with style.context("ggplot"):  # as optuna's plots leave it to all that come after
        assert main(["study", "tables", str(DONE[0])]) == 0
    assert "Collapsed seeds" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in page} == page


def test_the_studies_yaml_is_right() -> None:
    plan = Plan(REPOSITORY / "studies/priming/study.yaml")
    assert len(plan.study.seeds) >= 5
    quirks = {quirk for one in plan.study.conditions.values() for quirk in one.params.get("distill.quirks", [])}
    assert quirks == {"no-end", "teacher-order", "label-shift", "bos", "prompt-offset"}
    rows = plan.study.params["dataset"]
    assert (rows["train_rows"], rows["test_rows"]) == (2638, 1319)


def test_a_finished_study_asks_of_its_yaml_what_its_results_have() -> None:
    for folder in DONE:
        if (folder / "study.yaml").exists():
            study, results = Plan(folder / "study.yaml").study, read_study(folder / "results.json")
            assert {name: one.model_dump(mode="json") for name, one in study.questions.items()} == results["questions"]
