"""The results of a profile, as a document and as the paper's table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from kd.assess.score import read_score
from kd.config import Config
from kd.files import read_json, whole_folder, write_json, write_text
from kd.published import CHECK_LOSSES, RESULTS
from kd.report.plots import accuracy_chart
from kd.report.statistics import wilson_interval

CHECK = "check.json"  # what training leaves beside an adapter
HEADER = ("Experiment", "Accuracy", "95 % interval", "Correct", "Undecided", "Published")


def report(config: Config) -> dict[str, Any]:
    """Score every experiment's log and write results.json, results.md and accuracy.png; returns the results."""
    results = collect(config)
    with whole_folder(config.artifacts / "report") as work:
        write_json(work / "results.json", results)
        write_text(work / "results.md", markdown(results))
        accuracy_chart(results, work / "accuracy.png")
    return results


def collect(config: Config) -> dict[str, Any]:
    """The results document: what was run and, per experiment, what it came to and what was published."""
    return {
        "profile": config.profile,
        "protocol": config.distill.protocol,
        "seed": config.seed,
        "dataset": config.dataset.model_dump(),
        "student": config.student.model_dump(),
        "teacher": config.teacher.model_dump(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "experiments": {name: _result(config, name) for name in config.experiments},
        "check_losses": _check_losses(config),
    }


def table(results: dict[str, Any]) -> str:
    """The table for a terminal, columns aligned."""
    return aligned(_rows(results))


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows for a terminal, the first as the header, columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown, with what stands behind it."""
    header, *rows = _rows(results)
    lines = [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    data = results["dataset"]
    setting = (
        f"Profile `{results['profile']}`, protocol `{results['protocol']}`, seed {results['seed']}; "
        f"{data['train_rows']} training and {data['test_rows']} test rows "
        f"({data['source']}, {data['answers']} answers)."
    )
    parts = (f"# Results: {results['profile']}", "", setting, "", *lines, "", _undecided(results))
    return "\n".join(parts) + _check_table(results)


def _result(config: Config, experiment: str) -> dict[str, Any]:
    score = read_score(config.artifacts / "logs" / f"{experiment}.csv", config.dataset.test_rows)
    low, high = wilson_interval(score.correct, score.rows)
    published = RESULTS.get(experiment)
    return {
        "correct": score.correct,
        "rows": score.rows,
        "accuracy": score.correct / score.rows,
        "interval": [low, high],
        "undecided": score.undecided,
        "published_accuracy": published.accuracy / 100 if published else None,
    }


def _check_losses(config: Config) -> dict[str, Any]:
    """The original's check of each adapter that is there: mean cross entropy over the test rows, misaligned as in its
    training, beside the published one."""
    found = {}
    for adapter in config.adapters:
        path = config.artifacts / "adapters" / adapter / CHECK
        if path.exists():
            loss = read_json(path, "an adapter's check loss")["check_loss"]
            found[adapter] = {"check_loss": loss, "published": CHECK_LOSSES.get(adapter)}
    return found


def _check_table(results: dict[str, Any]) -> str:
    """The check losses as Markdown, nothing where no adapter is there."""
    if not results["check_losses"]:
        return ""
    rows = [
        f"| {name} | {loss['check_loss']:.3f} | {loss['published'] or 'none'} |\n"
        for name, loss in results["check_losses"].items()
    ]
    head = "| Adapter | Check loss | Published |\n|---|---|---|\n"
    what = "Check loss after training, the original's own: mean cross entropy of answer token i at question position i."
    return f"\n{what}\n\n{head}{''.join(rows)}"


def _rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [HEADER]
    for name, result in results["experiments"].items():
        low, high = result["interval"]
        published = result["published_accuracy"]
        rows.append(
            (
                name,
                f"{result['accuracy']:.2%}",
                f"{low:.1%} to {high:.1%}",
                f"{result['correct']}/{result['rows']}",
                str(len(result["undecided"])),
                f"{published:.2%}" if published is not None else "not in the paper",
            )
        )
    return rows


def _undecided(results: dict[str, Any]) -> str:
    """What the extraction rules left to a person; such rows count as wrong (-1)."""
    lists = {name: result["undecided"] for name, result in results["experiments"].items() if result["undecided"]}
    if not lists:
        return "The extraction rules settled every row.\n"
    lines = (f"- {name}: {', '.join(map(str, rows))}\n" for name, rows in lists.items())
    return "Test rows that no extraction rule settles; they count as wrong (-1) until a person decides:\n\n" + "".join(
        lines
    )
