"""The paper's figures stand beside one's own only where a profile reruns the paper."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from rows import prepare_tests
from ruamel.yaml import YAML

from kd.cli import main
from kd.config import load_config
from kd.report.published import differences
from kd.scoring.log import COLUMNS

ROWS = {"train_rows": 2638, "test_rows": 1319}
Write = Callable[[dict[str, Any]], None]


def profile(name: str) -> dict[str, Any]:
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles" / f"{name}.yaml")
    return params


def test_the_papers_profile_reruns_the_paper_and_the_others_say_why_they_do_not() -> None:
    assert differences(load_config(REPOSITORY / "profiles/paper.yaml")) == []
    assert differences(load_config(REPOSITORY / "profiles/single-gpu.yaml")) == ["another teacher", "another student"]
    assert {"other data", "another teacher", "another student"} < set(
        differences(load_config(REPOSITORY / "profiles/mini.yaml"))
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dataset.name", "someone/gsm8k-like", ["other data"]),
        ("dataset.answers", "main", ["other data"]),
        ("dataset.test_rows", 100, ["another number of rows"]),
        ("teacher.model.name", "meta-llama/Meta-Llama-3.1-8B-Instruct", ["another teacher"]),
        ("student.model", {"source": "bundled"}, ["another student"]),
        ("distill.protocol", "aligned", ["another protocol"]),
        ("distill.learning_rate", 5e-5, ["other settings in training"]),
        ("distill.lora.rank", 8, ["other settings in training"]),
        ("assess.max_new_tokens", 128, ["students asked in another way"]),
        # The same experiment, brought or run in another way.
        ("dataset", {"source": "folder", "path": ".", "answers": "socratic"} | ROWS, []),
        ("student.model", {"source": "folder", "path": "~/models/Meta-Llama-3.1-8B-Instruct"}, []),
        ("student.model.name", "meta-llama/Llama-3.1-8B-Instruct", []),
        ("teacher.batch_rows", 8, []),
        ("seeds", [2, 3], []),
    ],
)  # fmt: skip
def test_what_makes_another_experiment(key: str, value: Any, said: list[str], write_params: Write) -> None:
    params = inner = profile("paper")
    *path, last = key.split(".")
    for part in path:
        inner = inner[part]
    inner[last] = value
    write_params(params)
    assert differences(load_config(Path("params.yaml"))) == said


@pytest.fixture
def paper_logs(write_params: Write) -> None:
    """The paper's profile with logs, the trained students' half right, and what stands behind the table."""
    write_params(profile("paper"))
    rows = [(f"How many are {i} and 2?", f"They are {i + 2}.\n#### {i + 2}") for i in range(1319)]
    prepare_tests(rows, "paper")
    folder = Path("artifacts/paper/logs")
    folder.mkdir(parents=True)
    for name, experiment in load_config(Path("params.yaml")).experiments.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for i, (question, answer) in enumerate(rows):
                taken = i + 2 if i % 2 == 0 and experiment.adapter else 0
                said = f"{question}{experiment.suffix} \\boxed{{{taken}}}"
                writer.writerow((question, answer, said, 9, False, taken, "boxed", taken > 0))
    adapter = Path("artifacts/paper/adapters/teacher-kd-1")
    adapter.mkdir(parents=True)
    (adapter / "check.json").write_text('{"check_loss": 9.8765, "rows": 6, "versions": {}}')
    one = {"mean_max_probability": 0.57312, "positions": 900, "questions": 7, "versions": {}}
    Path("artifacts/paper/statistics.json").write_text(json.dumps({"base": one}))


@pytest.mark.usefixtures("paper_logs")
def test_a_rerun_of_the_paper_has_the_papers_figures_beside_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    printed = capsys.readouterr().out
    assert "This profile reruns the paper" in printed
    results = json.loads(Path("artifacts/paper/report/results.json").read_text())
    assert results["differs_from_paper"] == []
    assert results["experiments"]["teacher-kd"]["published_accuracy"] == 0.423
    assert results["experiments"]["no-distillation-matched"]["published_accuracy"] is None
    text = Path("artifacts/paper/report/results.md").read_text()
    assert "| teacher-kd | 50.04% | 47.3% to 52.7% | 660/1319 | +50.0, p < 0.0001 | 6.8 points | 42.30% |" in text
    assert "| the control |  | not in the paper |" in text
    assert "| teacher-kd | 9.877 | 10.402 |" in text
    assert "| base | 0.5731 | 900 of 7 questions | 0.573 |" in text
    assert "Diamonds" in Path("artifacts/paper/report/index.html").read_text()
