"""A study's tables, for a terminal and for its README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd.errors import UserError
from kd.report.tables import aligned, markdown_table
from kd.study.results import RULES


@dataclass(frozen=True)
class Table:
    """A table of the study: its name in a README, its title, its rows with the header first."""

    name: str
    title: str
    rows: list[tuple[str, ...]]


def study_tables(results: Mapping[str, Any]) -> list[Table]:
    """The study's tables; one without comparisons has its header only."""
    summary = results["summary"]
    tested = "exact paired test over the questions, Holm-corrected within {}; bootstrap interval of the difference"
    in_condition = tested.format("a condition")
    quirks = f"Each quirk minus the reference, and the spread of the reference's seeds: {tested.format('the table')}"
    return [
        Table("accuracy", "Accuracy with its 95 % interval, and from the lowest to the highest seed", _rows(summary)),
        Table("priming", f"Primed teachers: {in_condition}", _pair_rows(summary, "priming in")),
        Table("training", f"Trained against bare: {in_condition}", _pair_rows(summary, "training in")),
        Table("teachers", f"Teachers: {in_condition}", _pair_rows(summary, "teachers in")),
        Table("conditions", f"Conditions: {tested.format('a pair of conditions')}", _pair_rows(summary, " against ")),
        Table("quirks", quirks, _quirk_rows(summary)),
        Table("start", "The bare student's divergence from each teacher", _start_rows(results["starting_divergence"])),
    ]


def _start_rows(divergences: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    header: tuple[str, ...] = ("Teacher", "Prompt", "Divergence")
    return [
        header,
        *((teacher, p, f"{value:.4f}") for teacher, each in divergences.items() for p, value in each.items()),
    ]


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    header = ("Condition", "Experiment", "Seeds", "Documented rules", "Seeds' range", "Robust rules", "Seeds' range")
    rows: list[tuple[str, ...]] = [(*header, "Answer loss", "Divergence", "At limit")]
    for row in summary["rows"]:
        rows.append(
            (
                row["condition"],
                row["experiment"],
                str(row["seeds"]),
                *(cell for rules in RULES for cell in _accuracy_cells(row["rules"][rules], row["seeds"])),
                _loss_cell(row["answer_loss"], row["seeds"]),
                _loss_cell(row["divergence"], row["seeds"]),
                f"{row['at_limit_share']:.1%}",
            )
        )
    return rows


def _accuracy_cells(found: Mapping[str, Any], seeds: int) -> tuple[str, str]:
    low, high = found["interval"]
    across = f"{found['lowest']:.2%} to {found['highest']:.2%}" if seeds > 1 else ""
    return f"{found['accuracy']:.2%} ({low:.1%} to {high:.1%})", across


def _loss_cell(spread: Mapping[str, float] | None, seeds: int) -> str:
    if spread is None:
        return ""
    across = f" ({spread['lowest']:.4f} to {spread['highest']:.4f})" if seeds > 1 else ""
    return f"{spread['mean']:.4f}{across}"


def _pair_rows(summary: Mapping[str, Any], families: str) -> list[tuple[str, ...]]:
    """The comparisons of the families whose name holds `families`, the rule sets side by side."""
    by_rules = (
        [
            pair
            for one in summary["comparisons"]
            if one["rules"] == rules and families in one["family"]
            for pair in one["pairs"]
        ]
        for rules in RULES
    )
    tested = ("95 % interval", "p", "p (Holm)")
    rows: list[tuple[str, ...]] = [("First", "Second", "Documented rules", *tested, "Robust rules", *tested)]
    for pairs in zip(*by_rules, strict=True):
        cells = (
            cell
            for pair in pairs
            for cell in (f"{pair['difference']:+.2%}", _range(pair), f"{pair['p']:.2g}", f"{pair['p_holm']:.2g}")
        )
        rows.append((pairs[0]["first"], pairs[0]["second"], *cells))
    return rows


def _quirk_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    tested = ("95 % interval", "p (Holm)")
    header = ("Quirk", "Reference", "Documented rules", *tested, "Robust rules", *tested, "Answer loss", "Divergence")
    rows: list[tuple[str, ...]] = [header]
    for one in summary["quirks"]:
        cells = (
            cell
            for found in one["rules"].values()
            for cell in (_change_cell(found, ".2%"), _range(found), f"{found['p_holm']:.2g}")
        )
        losses = (_change_cell(one[loss], ".4f") for loss in ("answer_loss", "divergence"))
        rows.append((one["quirk"], one["reference"], *cells, *losses))
    return rows


def _change_cell(found: Mapping[str, float] | None, form: str) -> str:
    return "" if found is None else f"{found['change']:+{form}} (spread {found['reference_spread']:{form}})"


def _range(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{low:+.1%} to {high:+.1%}"


def text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal, those that have rows."""
    rows = results["rows"]
    setting = (
        f"Study {results['study']}: {results['question']}\n{rows['train']} training and {rows['test']} test questions, "
        f"{len(results['runs'])} of {results['planned']} runs."
    )
    if results["diverged"]:
        setting += f"\nDiverged in training, and in no table: {', '.join(results['diverged'])}."
    tables = [f"{table.title}\n{aligned(table.rows)}" for table in study_tables(results) if len(table.rows) > 1]
    return "\n".join([f"{setting}\n", *tables])


def markdown_tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Each table by its name, as Markdown."""
    return {table.name: markdown_table(table.rows) for table in study_tables(results)}


def with_tables(document: str, results: Mapping[str, Any]) -> str:
    """The document with each table where `<!-- table: NAME -->` and `<!-- end of table -->` stand around its place."""
    tables = markdown_tables(results)
    start, end = "<!-- table: ", "<!-- end of table -->"
    before, *parts = document.split(start)
    filled = [before]
    for part in parts:
        name = part.partition(" -->")[0]
        if name not in tables:
            raise UserError(f"{start}{name} -->: unknown table, expected one of {', '.join(tables)}")
        _, found, behind = part.partition(end)
        if not found:
            raise UserError(f"{start}{name} -->: the table has no end; put a line {end} behind it")
        filled.append(f"{start}{name} -->\n\n{tables[name]}\n{end}{behind}")
    return "".join(filled)
