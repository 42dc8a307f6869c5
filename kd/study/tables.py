"""A study's tables, for a terminal and for its README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.errors import UserError
from kd.report.tables import aligned, markdown_table
from kd.study.results import RULES

Rows = list[tuple[str, ...]]  # the header first


def study_tables(results: Mapping[str, Any]) -> dict[str, tuple[str, Rows]]:
    """Each table's title and rows, by its name: the students, then one for each question."""
    summary = results["summary"]
    title = "Accuracy with its 95 % interval; losses, from the lowest to the highest seed"
    tables = {"students": (title, _students(summary))}
    for name, question in results["questions"].items():
        title = f"{question['question']} (p after Holm's correction over the table)"
        tables[name] = title, _pairs(summary, name, results["margin"])
    return tables


def _students(summary: Mapping[str, Any]) -> Rows:
    header = ("Student", "Seeds", "Documented rules", "Seeds' range", "Robust rules", "Answer loss", "Divergence")
    rows: Rows = [(*header, "At limit", "Collapsed seeds")]
    for name, student in summary["students"].items():
        documented, robust = (student[rules] for rules in RULES)
        across = f"{documented['lowest']:.1%} to {documented['highest']:.1%}" if student["seeds"] > 1 else ""
        rows.append(
            (
                name,
                str(student["seeds"]),
                f"{documented['accuracy']:.1%} ({' to '.join(f'{100 * side:.1f}' for side in documented['interval'])})",
                across,
                f"{robust['accuracy']:.1%}",
                *(_spread(student[loss]) for loss in ("answer_loss", "divergence")),
                f"{student['at_limit']:.1%}",
                ", ".join(map(str, student["collapsed"])),
            )
        )
    return rows


def _pairs(summary: Mapping[str, Any], question: str, margin: float) -> Rows:
    """Differences in points, what could have been found, and the seeds that collapsed on either side."""
    equal = f"Equal to {100 * margin:.3g} points"
    header = ("First - second", "Points", "95 % interval", "p", "Could be found", equal, "Robust rules", "p")
    rows: Rows = [(*header, "Collapsed seeds")]
    documented, robust = (summary["comparisons"][question][rules] for rules in RULES)
    for name, pair in documented.items():
        collapsed = [summary["students"][side]["collapsed"] for side in name.split(" - ")]
        rows.append(
            (
                name,
                _points(pair["difference"]),
                " to ".join(map(_points, pair["interval"])),
                f"{pair['p_holm']:.2g}",
                f"{100 * pair['detectable']:.1f}",
                "yes" if pair["equivalent"] else "not shown",
                _points(robust[name]["difference"]),
                f"{robust[name]['p_holm']:.2g}",
                " - ".join(", ".join(map(str, seeds)) or "none" for seeds in collapsed) if any(collapsed) else "",
            )
        )
    return rows


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # a sum, so that no zero is negative


def _spread(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return ""
    across = "" if spread["lowest"] == spread["highest"] else f" ({spread['lowest']:.3f} to {spread['highest']:.3f})"
    return f"{spread['mean']:.3f}{across}"


def text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal, those that have rows."""
    rows = results["rows"]
    setting = (
        f"Study {results['study']}: {results['question']}\n{rows['train']} training and {rows['test']} test questions, "
        f"{len(results['runs'])} of {results['planned']} runs.\n"
    )
    tables = [f"{title}\n{aligned(cells)}" for title, cells in study_tables(results).values() if len(cells) > 1]
    return "\n".join([setting, *tables])


def with_tables(document: str, results: Mapping[str, Any], where: str) -> str:
    """The document with each table where `<!-- table: NAME -->` and `<!-- end of table -->` stand around its place."""
    tables = {name: markdown_table(rows) for name, (_, rows) in study_tables(results).items()}
    start, end = "<!-- table: ", "<!-- end of table -->"
    before, *parts = document.split(start)
    filled = [before]
    for part in parts:
        name = part.partition(" -->")[0]
        if name not in tables:
            raise UserError(f"{where}: {start}{name} -->: unknown table, expected one of {', '.join(tables)}")
        _, found, behind = part.partition(end)
        if not found:
            raise UserError(f"{where}: {start}{name} -->: the table has no end; put a line {end} behind it")
        filled.append(f"{start}{name} -->\n\n{tables[name]}\n{end}{behind}")
    return "".join(filled)
