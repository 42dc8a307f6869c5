"""The results of a profile, as a document and as the paper's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kd.config import Config
from kd.io.files import read_json
from kd.paper import CHECK_LOSSES, RESULTS
from kd.scoring.log import Score
from kd.scoring.significance import compare_pairs, wilson_interval

CHECK = "check.json"  # what training leaves beside an adapter
HEADER = ("Experiment", "Accuracy", "95 % interval", "Correct", "By hand", "Undecided", "Published")
PAIRS_HEADER = ("first", "second", "difference", "95 % interval", "only first", "only second", "p", "p (Holm)")
PAIRS_TITLE = "Pairs on the same questions: McNemar's exact test, Holm-corrected; bootstrap interval of the difference"


def collect(config: Config, scores: Mapping[str, Score]) -> dict[str, Any]:
    """The results document: what was run and, per experiment, what it came to and what was published."""
    prompts, trained = read_prompts(config), _trained(config)
    return {
        "profile": config.profile,
        "protocol": config.distill.protocol,
        "seed": config.seed,
        "dataset": config.dataset.model_dump(),
        "student": config.student.model_dump(),
        "teacher": config.teacher.model_dump(),
        "versions": {  # of what made the results, wherever that was; not of the report
            "training": {adapter: check["versions"] for adapter, check in trained.items()},
            "teacher": {prompt: found["versions"] for prompt, found in prompts.items()},
        },
        "prompts": prompts,
        "experiments": {name: _result(name, scored) for name, scored in scores.items()},
        "comparisons": [
            asdict(pair) for pair in compare_pairs({name: scored.right for name, scored in scores.items()}, config.seed)
        ],
        "check_losses": {
            adapter: {"check_loss": check["check_loss"], "published": CHECK_LOSSES.get(adapter)}
            for adapter, check in trained.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """The table for a terminal, columns aligned, and the pairs below it."""
    return f"{aligned(result_rows(results))}\n{PAIRS_TITLE}\n{aligned(pair_rows(results['comparisons']))}"


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows for a terminal, the first as the header, columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def setting(results: dict[str, Any]) -> str:
    """What was run, in a sentence."""
    data = results["dataset"]
    return (
        f"Profile {results['profile']}, protocol {results['protocol']}, seed {results['seed']}; "
        f"{data['train_rows']} training and {data['test_rows']} test rows "
        f"({data['source']}, {data['answers']} answers)."
    )


def markdown(results: dict[str, Any]) -> str:
    """The same as Markdown, with what stands behind it."""
    parts = [
        f"# Results: {results['profile']}\n",
        f"{setting(results)}\n",
        markdown_table(result_rows(results)),
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


def _result(experiment: str, scored: Score) -> dict[str, Any]:
    rows = len(scored.right)
    published = RESULTS.get(experiment)
    return {
        "correct": scored.correct,
        "rows": rows,
        "accuracy": scored.correct / rows,
        "interval": wilson_interval(scored.correct, rows),
        "by_hand": scored.by_hand,
        "undecided": scored.undecided,
        "published_accuracy": published.accuracy / 100 if published else None,
    }


def _trained(config: Config) -> dict[str, dict[str, Any]]:
    """What training left beside each adapter that is there: the original's check, mean cross entropy over the test
    rows, misaligned as in its training, and the libraries' versions."""
    return {
        adapter: read_json(path, f"the check loss that `kd train {adapter}` writes")
        for adapter in config.adapters
        if (path := config.artifacts / "adapters" / adapter / CHECK).exists()
    }


def check_rows(losses: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table of check losses, its header first."""
    rows: list[tuple[str, ...]] = [("Adapter", "Check loss", "Published")]
    return rows + [
        (
            name,
            f"{one['check_loss']:.3f}",
            "not in the paper" if one["published"] is None else f"{one['published']:.3f}",
        )
        for name, one in losses.items()
    ]


def result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the paper's table, its header first."""
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
                str(result["by_hand"]),
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
    return (
        "Test rows that no extraction rule settles; they count as wrong (-1) until `kd review` decides them:\n\n"
        + "".join(lines)
    )


def read_prompts(config: Config) -> dict[str, Any]:
    """What `measure_prompts` wrote; nothing where it has not run."""
    path = config.artifacts / "statistics.json"
    return dict(read_json(path, "what `kd statistics` writes")) if path.exists() else {}


def prompt_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table of them, its header first."""
    table: list[tuple[str, ...]] = [("Prompt", "Mean largest probability", "Positions", "Published")]
    for prompt, one in found.items():
        published = one["published"]
        value, positions = f"{one['mean_max_probability']:.4f}", f"{one['positions']} of {one['questions']} questions"
        table.append((prompt, value, positions, f"{published}" if published is not None else "not in the paper"))
    return table
