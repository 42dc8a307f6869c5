"""The results document (kd/report/results.py) as tables and sentences, for a terminal, as Markdown, for the page."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

from kd.report.finding import comparability, detectable, finding, is_difference, listed, p_value, points
from kd.report.signs import WORDS, collapse, in_words, named
from kd.scoring.comparison import MARGIN

PAIRS_HEADER = (
    "first",
    "second",
    "difference",
    "95 % interval",
    "only first",
    "only second",
    "p",
    "p (Holm)",
    "detectable",
    "excluded",
)
ONE_RUN, SEVERAL_RUNS = "McNemar's exact test", "a t-test over seeds and questions"
MARK = "*"  # of a figure that hangs on a run that collapsed


def table(results: dict[str, Any]) -> str:
    """For a terminal: what is shown, the table with its notes, and the pairs below it."""
    title, pairs = pair_table(results)
    parts = [
        _filled([finding(results), comparability(results)]),
        aligned(result_rows(results)),
        _filled(notes(results)),
        f"{title}\n{aligned(pairs)}",
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
    of_seeds = f", seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}" if seeds else ""
    return (
        f"Profile {results['profile']}, protocol {results['protocol']}{of_seeds}; "
        f"{data['train_rows']} training and {data['test_rows']} test rows "
        f"({data['source']}, {data['answers']} answers)."
    )


def markdown(results: dict[str, Any]) -> str:
    """The same as Markdown, with what stands behind it."""
    title, pairs = pair_table(results)
    parts = [
        f"# Results: {results['profile']}\n",
        f"{finding(results)} {comparability(results)}\n",
        f"{setting(results)}\n",
        markdown_table(result_rows(results)),
        "".join(f"- {note}\n" for note in notes(results)),
        _undecided(results),
        f"## Pairs\n\n{title}.\n",
        markdown_table(pairs),
    ]
    if has_seeds(results):
        parts += ["## Seeds\n", markdown_table(run_rows(results))]
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


def pair_table(results: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    """The table of all pairs: its title and its rows."""
    rows = pair_rows(results["comparisons"], collapsed(results))
    return pairs_title(_test(results), starred(results)), rows


def pairs_title(test: str = ONE_RUN, starred: str = "") -> str:
    """What a table of pairs has, by which test, and behind it what a star says."""
    return (
        f"Pairs on the same questions: {test}, Holm-corrected; the smallest difference that would have been shown with "
        f"80 % power; whether one of {points(MARGIN)} or more is excluded{starred}"
    )


def starred(results: Mapping[str, Any]) -> str:
    """Behind a title, what the mark says where a figure has one."""
    fallen = named(results["experiments"])
    return f"; {MARK} collapsed: {listed(fallen)}" if fallen else ""


def pair_rows(comparisons: Sequence[Mapping[str, Any]], collapsed: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The rows of a table of comparisons (of `results.comparisons`), its header first; a difference of a student that
    is among the `collapsed` has a mark."""
    rows: list[tuple[str, ...]] = [PAIRS_HEADER]
    for pair in comparisons:
        low, high = pair["interval"]
        marked = MARK if {pair["first"], pair["second"]} & set(collapsed) else ""
        rows.append(
            (
                pair["first"],
                pair["second"],
                f"{pair['difference']:+.2%}{marked}",
                f"{low:+.1%} to {high:+.1%}",
                f"{round(pair['only_first'], 1):g}",
                f"{round(pair['only_second'], 1):g}",
                f"{pair['p']:.2g}",
                f"{pair['p_holm']:.2g}",
                detectable(pair),
                "yes" if pair["excluded"] else "no",
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
    experiments, control = results["experiments"], results["control"]
    every = experiments.values()
    columns: list[tuple[str, ...]] = [
        ("Experiment", *experiments),
        ("Accuracy", *(f"{one['accuracy']:.2%}{MARK * bool(one['collapsed'])}" for one in every)),
        ("95 % interval", *(_share_interval(one["interval"]) for one in every)),
    ]
    if has_seeds(results):
        columns.append(("Seeds", *map(_spread, every)))
    else:
        columns.append(("Correct", *(f"{one['runs'][0]['correct']}/{one['rows']}" for one in every)))
    if control:
        columns.append(("Against control", *(_against(one) for one in every)))
        found = [one["against_control"] for one in every]
        columns.append(("Detectable", *("" if one is None else detectable(one) for one in found)))
    if not results["differs_from_paper"]:
        columns.append(("Published", *(_published(one["published_accuracy"], ".2%") for one in every)))
    marks = [mark(one) for one in every]
    if any(marks):
        columns.append(("Mark", *marks))
    return list(zip(*columns, strict=True))


def run_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table of all runs, its header first."""
    rows: list[tuple[str, ...]] = [("Experiment", "Seed", "Accuracy", "Correct", "Mark")]
    for name, one in results["experiments"].items():
        rows += [
            (
                name,
                "none" if run["seed"] is None else str(run["seed"]),
                f"{run['accuracy']:.2%}",
                f"{run['correct']}/{run['rows']}",
                f"collapsed: {_words([run])}" if run["signs"] and one["trained"] else _words([run]),
            )
            for run in one["runs"]
        ]
    return rows


def has_seeds(results: Mapping[str, Any]) -> bool:
    """Whether a student was trained with several."""
    return any(len(one["runs"]) > 1 for one in results["experiments"].values())


def collapsed(results: Mapping[str, Any]) -> list[str]:
    """The students of which a run collapsed."""
    return [name for name, one in results["experiments"].items() if one["collapsed"]]


def mark(result: Mapping[str, Any]) -> str:
    """What a reader must know of a row before its accuracy: whether the student collapsed, and by what."""
    words = _words(result["runs"])
    return f"{collapse(result)}: {words}" if result["collapsed"] else words


def notes(results: Mapping[str, Any]) -> list[str]:
    """What stands below the table, a sentence each."""
    return [*_about_control(results), *_about_seeds(results), *_about_runs(results)]


def _about_control(results: Mapping[str, Any]) -> list[str]:
    experiments, control = results["experiments"], results["control"]
    if not control:
        return []
    others = len(experiments) - 1
    found = [
        f"Against control: points of accuracy above {control}, on the same questions; p of "
        f"{_test(results)} after Holm's correction over the {others} "
        f"comparison{'s' if others > 1 else ''} with it.",
        "Detectable: the smallest difference that would have been shown with 80 % power.",
    ]
    otherwise = [name for name, one in experiments.items() if name != control and not _asked_alike(one)]
    if otherwise:
        found.append(f"Asked in another way than the control: {', '.join(otherwise)}.")
    return found


def _about_seeds(results: Mapping[str, Any]) -> list[str]:
    """What the table says of other seeds, and which of its figures hang on a run that collapsed."""
    experiments = results["experiments"]
    once = [name for name, one in experiments.items() if one["trained"] and len(one["runs"]) == 1]
    found = []
    if once:
        whose = "" if not has_seeds(results) else f" of {listed(once)}"
        found.append(
            f"One seed{whose}: intervals and tests are over the questions alone and say nothing of other seeds."
        )
    if has_seeds(results):
        found.append("Accuracy: the mean over the seeds; Seeds: the lowest and the highest.")
    if collapsed(results):
        found.append(f"Figures with {MARK} hang on a student that collapsed: {', '.join(named(experiments))}.")
    return found


def _about_runs(results: Mapping[str, Any]) -> list[str]:
    """What single runs showed, and what of them no rule settled."""
    found = []
    for label, trained, run in _labelled(results):
        said = "; ".join(in_words(sign, run["rows"]) for sign in run["signs"])
        if said:
            found.append(f"{label}, {'collapsed' if trained else 'not trained'}: {said}.")
    for what, counts in (
        ("No rule settles, so they count as wrong until `kd review` decides them", "undecided"),
        ("Decided by hand", "by_hand"),
    ):
        rows = {name: sum(_count(run[counts]) for run in one["runs"]) for name, one in results["experiments"].items()}
        if any(rows.values()):
            found.append(f"{what}: {', '.join(f'{name} {count}' for name, count in rows.items() if count)}.")
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


def _labelled(results: Mapping[str, Any]) -> Iterator[tuple[str, bool, Mapping[str, Any]]]:
    """Every run with what it is called in a sentence, and whether it was trained."""
    for name, one in results["experiments"].items():
        for run in one["runs"]:
            yield f"{name} (seed {run['seed']})" if len(one["runs"]) > 1 else name, one["trained"], run


def _words(runs: Sequence[Mapping[str, Any]]) -> str:
    """The signs of some runs, each once."""
    return ", ".join(dict.fromkeys(WORDS[sign["by"]] for run in runs for sign in run["signs"]))


def _test(results: Mapping[str, Any]) -> str:
    return SEVERAL_RUNS if has_seeds(results) else ONE_RUN


def _share_interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:.1%} to {high:.1%}"


def _spread(result: Mapping[str, Any]) -> str:
    """The lowest and the highest of a student's seeds."""
    if not result["trained"]:
        return "none"
    if len(result["runs"]) == 1:
        return f"{result['lowest']:.1%}"
    return f"{result['lowest']:.1%} to {result['highest']:.1%} ({len(result['runs'])})"


def _against(result: Mapping[str, Any]) -> str:
    """A row's difference from the control, and whether it is one, or is shown to be small."""
    against = result["against_control"]
    if against is None:
        return "the control"
    if is_difference(against):
        shown = p_value(against["p_holm"])
    else:
        shown = f"{points(MARGIN)} excluded" if against["excluded"] else "no difference shown"
    return f"{100 * against['difference']:+.1f}{MARK * bool(result['collapsed'])}, {shown}"


def _asked_alike(result: Mapping[str, Any]) -> bool:
    return bool(result["against_control"]["asked_alike"])


def _count(rows: int | Sequence[int]) -> int:
    return rows if isinstance(rows, int) else len(rows)


def _undecided(results: Mapping[str, Any]) -> str:
    """The test rows that the extraction rules left to a person."""
    lists = {label: run["undecided"] for label, _, run in _labelled(results) if run["undecided"]}
    if not lists:
        return "The extraction rules settled every row.\n"
    lines = (f"- {name}: {', '.join(map(str, rows))}\n" for name, rows in lists.items())
    return "## Test rows that no rule settles\n\n" + "".join(lines)
