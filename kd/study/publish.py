"""What a study's runs come to, in its own folder: results.json, the README's tables and figures, the pictures it shows,
and logs/ for DVC."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.data.rows import read_examples
from kd.errors import UserError
from kd.io.files import as_json, read_json, whole_folder, write_whole_file
from kd.io.progress import progress
from kd.report.charts import Chart, accuracy_chart, difference_chart, standalone, svg
from kd.report.figures import fill
from kd.study.plan import DATA, Plan, at
from kd.study.results import RULES, check_study, read_study, summarise
from kd.study.tables import with_tables
from kd.study.work import done, result_of

RESULTS, README, LOGS = "results.json", "README.md", "logs"


def publish(plan: Plan) -> list[str]:
    """Write results.json, fill the README and compress the logs, of the runs there are; returns those missing."""
    folder, study = plan.path.parent, plan.study
    runs = [run for run in plan.runs if done(plan, plan.task(run.name))]
    if not runs:
        raise UserError(f"{Path.cwd()}: no run is done; `kd study run {plan.name}` makes them")
    results = {
        "study": study.study,
        "question": study.question,
        "questions": {name: question.model_dump(mode="json") for name, question in study.questions.items()},
        "margin": study.margin,
        "control": study.control,
        "rows": {split: len(read_examples(at(DATA, "data", f"{split}.jsonl"))) for split in ("train", "test")},
        "settings": {arm: plan.document(arm) for arm in dict.fromkeys(run.arm for run in runs)},
        "teachers": {name: tuned.model_dump() for name, tuned in study.teachers.items()},
        "searches": {
            name: read_json(plan.best(name), "what a search found")
            for name in study.searches
            if plan.best(name).exists()
        },
        "commands": {step: f"kd study {step} {plan.name}" for step in ("run", "results", "tables")},
        "planned": len(plan.runs),
        "runs": [result_of(run) for run in runs],
    }
    results["summary"] = summarise(results)
    check_study(results, folder / RESULTS)
    write_whole_file(folder / RESULTS, as_json(results))
    fill_readme(folder, results)
    with whole_folder(folder / LOGS) as logs:
        for run in progress(runs, "compress", "log"):
            log = at(run.arm, "logs", f"{run.file}.csv")
            if log.exists():  # of a run that diverged there is none
                (logs / f"{run.arm}-{run.file}.csv.xz").write_bytes(lzma.compress(log.read_bytes(), preset=9))
    return [run.name for run in plan.runs if run not in runs]


def read_published(folder: Path) -> dict[str, Any]:
    """A study's results.json, checked; its README filled anew and its pictures drawn, so that they say the same."""
    results = read_study(folder / RESULTS)
    fill_readme(folder, results)
    return results


def fill_readme(folder: Path, results: Mapping[str, Any]) -> None:
    """Write a study's tables and figures into its README, and the pictures that the README shows beside it."""
    readme = folder / README
    if not readme.exists():
        return
    text = readme.read_text(encoding="utf-8")
    filled = fill(with_tables(text, results, str(readme)), results, str(readme))
    if filled != text:
        write_whole_file(readme, filled)
    for name, draw in PICTURES.items():
        if f"({name})" in text:
            chart = draw(results)
            write_whole_file(folder / name, standalone(chart, svg(chart)) + "\n")


def _accuracies(results: Mapping[str, Any]) -> Chart:
    students = {
        name: {**one[RULES[0]], **one, "runs": range(one["seeds"]), "published_accuracy": None}
        for name, one in results["summary"]["students"].items()
    }
    return accuracy_chart(students, results["control"] if results["control"] in students else None)


def _differences(results: Mapping[str, Any]) -> Chart:
    asked = {
        question: {_called(pair): difference for pair, difference in found[RULES[0]].items()}
        for question, found in results["summary"]["comparisons"].items()
    }
    return difference_chart({question: found for question, found in asked.items() if found}, results["margin"])


def _called(pair: str) -> str:
    """A pair with what both sides have in common in front."""
    first, second = (side.split("/") for side in pair.split(" - "))
    for common, other in ((0, 1), (1, 0)):
        if first[common] == second[common]:
            return f"{first[common]}: {first[other]} - {second[other]}"
    return pair


PICTURES = {"accuracy.svg": _accuracies, "differences.svg": _differences}
