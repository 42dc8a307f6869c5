"""The results document (kd/report/results.py) as tables and sentences, for a terminal, as Markdown, for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from kd.report.finding import comparability, finding, is_difference, p_value
from kd.report.signs import WORDS, in_words, signs

PAIRS_HEADER = ("first", "second", "difference", "95 % interval", "only first", "only second", "p", "p (Holm)")
PAIRS_TITLE = "Pairs on the same questions: McNemar's exact test, Holm-corrected; bootstrap interval of the difference"


def table(results: dict[str, Any]) -> str:
    """For a terminal: what is shown, the table with its notes, and the pairs below it."""
    parts = [
        _filled([finding(results), comparability(results)]),
        aligned(result_rows(results)),
        _filled(notes(results)),
        f"{PAIRS_TITLE}\n{aligned(pair_rows(results['comparisons']))}",
    ]
    return "\n".join(filter(None, parts))


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows for a terminal, the first as the header, columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def setting(results: dict[str, Any]) -> str:
    """What was run, in a sentence."""
    data, seeds = results["dataset"], results["seeds"]
    seeded = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return (
        f"Profile {results['profile']}, protocol {results['protocol']}, {seeded}; "
        f"{data['train_rows']} training and {data['test_rows']} test rows "
        f"({data['source']}, {data['answers']} answers)."
    )


def markdown(results: dict[str, Any]) -> str:
    """The same as Markdown, with what stands behind it."""
    parts = [
        f"# Results: {results['profile']}\n",
        f"{finding(results)} {comparability(results)}\n",
        f"{setting(results)}\n",
        markdown_table(result_rows(results)),
        "".join(f"- {note}\n" for note in notes(results)),
        _undecided(results),
        f"## Pairs\n\n{PAIRS_TITLE}.\n",
        markdown_table(pair_rows(results["comparisons"])),
    ]
    if results["check_losses"]:
        parts += [
            "## Check loss after training\n",
            "The original's own: mean cross entropy of answer token i at question position i, over the test rows.\n",
            markdown_table(check_rows(results["check_losses"])),
        ]
    if results["prompts"]:
        parts += [
            "## The teacher behind each prompt\n",
            "Its largest next-token probability, on average over every fifth question's positions.\n",
            markdown_table(prompt_rows(results["prompts"])),
        ]
    return "\n".join(parts)


def pair_rows(comparisons: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a table of comparisons (`statistics.Comparison` as dictionaries), its header first."""
    rows: list[tuple[str, ...]] = [PAIRS_HEADER]
    for pair in comparisons:
        low, high = pair["interval"]
        rows.append(
            (
                pair["first"],
                pair["second"],
                f"{pair['difference']:+.2%}",
                f"{low:+.1%} to {high:+.1%}",
                str(pair["only_first"]),
                str(pair["only_second"]),
                f"{pair['p']:.2g}",
                f"{pair['p_holm']:.2g}",
            )
        )
    return rows


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a Markdown table, the first as the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the paper's table, its header first; columns that would be empty are left out."""
    columns: list[tuple[str, ...]] = [
        ("Experiment", *results["experiments"]),
        *zip(("Accuracy", "95 % interval", "Correct"), *map(_accuracy, results["experiments"].values()), strict=True),
    ]
    experiments = results["experiments"].items()
    if results["control"]:
        columns.append(("Against control", *(_against(name, one, results["control"]) for name, one in experiments)))
    if not results["differs_from_paper"]:
        columns.append(("Published", *(_published(one["published_accuracy"], ".2%") for _, one in experiments)))
    marks = [mark(one) for _, one in experiments]
    if any(marks):
        columns.append(("Mark", *marks))
    return list(zip(*columns, strict=True))


def mark(result: Mapping[str, Any]) -> str:
    """What a reader must know of a row before its accuracy: whether the student collapsed, and by what."""
    words = ", ".join(WORDS[sign["by"]] for sign in signs(result))
    return f"collapsed: {words}" if words and result["trained"] else words


def notes(results: Mapping[str, Any]) -> list[str]:
    """What stands below the table, a sentence each."""
    experiments, control = results["experiments"], results["control"]
    found = []
    if control:
        others = len(experiments) - 1
        found.append(
            f"Against control: points of accuracy above {control}, on the same questions; p of McNemar's exact test "
            f"after Holm's correction over the {others} comparison{'s' if others > 1 else ''} with it."
        )
        otherwise = [name for name, one in experiments.items() if name != control and not _asked_alike(one)]
        if otherwise:
            found.append(f"Asked in another way than the control: {', '.join(otherwise)}.")
    for name, one in experiments.items():
        said = "; ".join(in_words(sign, one["rows"]) for sign in signs(one))
        if said:
            found.append(f"{name}, {'collapsed' if one['trained'] else 'not trained'}: {said}.")
    for what, counts in (
        ("No rule settles, so they count as wrong until `kd review` decides them", "undecided"),
        ("Decided by hand", "by_hand"),
    ):
        rows = {name: _count(one[counts]) for name, one in experiments.items() if one[counts]}
        if rows:
            found.append(f"{what}: {', '.join(f'{name} {count}' for name, count in rows.items())}.")
    return found


def check_rows(losses: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table of check losses, its header first."""
    return _with_published(
        [("Adapter", "Check loss"), *((name, f"{one['check_loss']:.3f}") for name, one in losses.items())],
        [one["published"] for one in losses.values()],
        ".3f",
    )


def prompt_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table of how sure the teacher is, its header first."""
    return _with_published(
        [
            ("Prompt", "Mean largest probability", "Positions"),
            *(
                (prompt, f"{one['mean_max_probability']:.4f}", f"{one['positions']} of {one['questions']} questions")
                for prompt, one in found.items()
            ),
        ],
        [one.get("published") for one in found.values()],
        "",
    )


def _filled(texts: Sequence[str]) -> str:
    """Sentences for a terminal, each on lines of its own."""
    return "".join(f"{fill(text, 110, subsequent_indent='  ')}\n" for text in texts)


def _with_published(rows: list[tuple[str, ...]], figures: Sequence[float | None], form: str) -> list[tuple[str, ...]]:
    """The rows with a column of published figures, where there are any."""
    if not any(figure is not None for figure in figures):
        return rows
    cells = ("Published", *(_published(figure, form) for figure in figures))
    return [(*row, cell) for row, cell in zip(rows, cells, strict=True)]


def _published(figure: float | None, form: str) -> str:
    return "not in the paper" if figure is None else format(figure, form)


def _accuracy(result: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = result["interval"]
    return f"{result['accuracy']:.2%}", f"{low:.1%} to {high:.1%}", f"{result['correct']}/{result['rows']}"


def _against(name: str, result: Mapping[str, Any], control: str) -> str:
    """A row's difference from the control, and whether it is one."""
    if name == control:
        return "the control"
    against = result["against_control"]
    shown = p_value(against["p_holm"]) if is_difference(against) else "no difference shown"
    return f"{100 * against['difference']:+.1f}, {shown}"


def _asked_alike(result: Mapping[str, Any]) -> bool:
    return bool(result["against_control"]["asked_alike"])


def _count(rows: int | Sequence[int]) -> int:
    return rows if isinstance(rows, int) else len(rows)


def _undecided(results: Mapping[str, Any]) -> str:
    """The test rows that the extraction rules left to a person."""
    lists = {name: one["undecided"] for name, one in results["experiments"].items() if one["undecided"]}
    if not lists:
        return "The extraction rules settled every row.\n"
    lines = (f"- {name}: {', '.join(map(str, rows))}\n" for name, rows in lists.items())
    return "## Test rows that no rule settles\n\n" + "".join(lines)
