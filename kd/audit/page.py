"""What a person sees of the audit: tables for a terminal, and a page with charts and every response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kd.audit.findings import share
from kd.audit.logs import COMMIT, SHA256, Log
from kd.data.number import equal
from kd.io.files import whole_folder, write_json, write_text
from kd.report import charts
from kd.report.explorer import Question, Responses, pack
from kd.report.finding import listed
from kd.report.page import Section, folded, page, table
from kd.report.tables import aligned, pair_rows, pairs_title
from kd.scoring.extract import RULE_SETS
from kd.scoring.log import BY_HAND
from kd.scoring.rules.documented import RULES
from kd.scoring.rules.rule import Extraction

SLOW = "math-verify"
COUNTED = "as published: notebook's rules, then by hand"


@dataclass(frozen=True)
class Prepared:
    """What the page needs that takes a while and can be had before the slow rule set is done: the responses, packed,
    and charts, drawn."""

    questions: int
    packed: str
    agreement: tuple[charts.Chart, str]
    length: tuple[charts.Chart, str]


def prepare(
    logs: dict[str, Log], extractions: dict[str, dict[str, list[Extraction]]], right: dict[str, list[bool]]
) -> Prepared:
    """Pack the responses and draw the charts that show nothing of the slow rule set."""
    first = next(iter(logs.values()))
    questions = [Question(*row) for row in zip(first.questions, first.worked, first.truth, strict=True)]
    responses = {name: _responses(log, extractions[name], right[name]) for name, log in logs.items()}
    answers = {name: [[found.answer for found in one.taken[COUNTED]]] for name, one in responses.items()}
    return Prepared(
        len(questions),
        pack(questions, {name: {name: one} for name, one in responses.items()}),
        charts.drawn(charts.agreement_chart(answers, {name: [rows] for name, rows in right.items()})),
        charts.drawn(
            charts.length_chart(
                {name: log.tokens for name, log in logs.items()},
                {name: log.reached_limit for name, log in logs.items()},
            )
        ),
    )


def write(document: dict[str, Any], prepared: Prepared, folder: Path) -> None:
    """Write audit.json, audit.txt, the charts and the page into `folder`, whole."""
    experiments = document["experiments"]
    counted = {name: e | {"accuracy": e["recomputed_accuracy"]} for name, e in experiments.items()}
    rule_sets = {name: {r: e["rule_sets"][r]["accuracy"] for r in RULE_SETS} for name, e in experiments.items()}
    shown = [
        charts.drawn(charts.accuracy_chart(counted)),
        prepared.agreement,
        charts.drawn(charts.rule_set_chart(rule_sets)),
        prepared.length,
    ]
    with whole_folder(folder) as work:
        write_json(work / "audit.json", document)
        write_text(work / "audit.txt", text(document))
        for chart, drawn in shown:
            charts.write_chart(chart, drawn, work)
        write_text(work / "index.html", _page(document, prepared, shown))


def text(document: dict[str, Any]) -> str:
    """The document for a person: one table per question."""
    experiments: dict[str, dict[str, Any]] = document["experiments"]
    changed = [file for file, published in document["data"].items() if not published]
    parts = [
        f"Not as published (SHA-256 differs): {', '.join(changed)}\n" if changed else "All files are as published.\n",
        "Counts: published, and recomputed from the rows\n" + aligned(_count_rows(experiments)),
        "Rows settled and right by each of the notebook's rules\n" + aligned(_rule_rows(experiments)),
        "Accuracy under each rule set, nothing decided by hand\n" + aligned(_rule_set_rows(experiments)),
        "Agreement with the authors' hand decisions\n" + aligned(_hand_rows(experiments)),
        f"{pairs_title()}\n" + aligned(pair_rows(document["comparisons"])),
        "Findings (docs/errata.md)\n" + "".join(f"{f['number']:>3}. {f['text']}\n" for f in document["findings"]),
    ]
    return "\n".join(parts)


def _count_rows(experiments: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("experiment", "published", "recomputed", "95 % interval", "automatic", "differ", "by hand")
    ]
    for name, e in experiments.items():
        low, high = e["interval"]
        published = e["manual_published"]
        rows.append(
            (
                name,
                f"{e['published_correct']} {e['published_accuracy']:.2%}",
                f"{e['recomputed_correct']} {e['recomputed_accuracy']:.2%}" + ("" if published else " (automatic)"),
                f"{low:.1%} to {high:.1%}",
                str(e["automatic"]),
                str(e["automatic_mismatches"]) if published else "",
                str(e["manual"]) if published else f"{e['manual']} (not published)",
            )
        )
    return rows


def _rule_rows(experiments: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    header = ("experiment", *RULES)
    return [header, *((name, *(share(rule) for rule in e["rules"].values())) for name, e in experiments.items())]


def _rule_set_rows(experiments: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    header = ("experiment", *RULE_SETS)
    return [
        header,
        *((name, *(f"{e['rule_sets'][r]['accuracy']:.2%}" for r in RULE_SETS)) for name, e in experiments.items()),
    ]


def _hand_rows(experiments: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    compared = [rules for rules in RULE_SETS if rules != "notebook"]
    return [
        ("experiment", "rows", *compared),
        *(
            (name, str(e["manual"]), *(f"{e['agreement_with_hand'][r] / e['manual']:.1%}" for r in compared))
            for name, e in experiments.items()
            if e["manual_published"] and e["manual"]
        ),
    ]


def _published(log: Log, extractions: dict[str, list[Extraction]]) -> list[Extraction]:
    """What counts in the published table: the number the authors took and, where it is the notebook's, its place."""
    automatic = extractions["notebook"]
    if log.decided is None:
        return automatic
    return [
        found if found.answer == decided else Extraction(decided, BY_HAND, None)
        for found, decided in zip(automatic, log.decided, strict=True)
    ]


def _responses(log: Log, extractions: dict[str, list[Extraction]], right: list[bool]) -> Responses:
    """A log for the page, read as it was published and by every rule set that says where an answer stands."""
    by_rules = {rules: found for rules, found in extractions.items() if rules != SLOW}
    return Responses(
        log.responses,
        log.tokens,
        log.reached_limit,
        {COUNTED: _published(log, extractions)} | by_rules,
        {COUNTED: right}
        | {
            rules: [equal(one.answer, truth) for one, truth in zip(found, log.truth, strict=True)]
            for rules, found in by_rules.items()
        },
    )


def _page(document: dict[str, Any], prepared: Prepared, shown: Sequence[tuple[charts.Chart, str]]) -> str:
    experiments = document["experiments"]
    pairs = table(pair_rows(document["comparisons"]), pairs_title())
    return page(
        "The published logs, scored again",
        f"{prepared.questions} questions of GSM8K's test set and {len(experiments)} experiments of arXiv 2412.17846; "
        f"logs of its repository at commit {COMMIT[:12]}.",
        [_opening(experiments)],
        [
            Section("The paper's table", table(_count_rows(experiments), "Published, and recomputed from the rows")),
            Section("Findings", _finding_list(document["findings"])),
            Section("Rules", table(_rule_rows(experiments), "Rows settled and right by each of the notebook's rules")),
            Section("Rule sets", table(_rule_set_rows(experiments), "Accuracy, nothing decided by hand")),
            Section(
                "Hand decisions", table(_hand_rows(experiments), "How often a rule set takes what the authors took")
            ),
            Section("Pairs", folded("All pairs of experiments on the same questions", pairs)),
        ],
        shown,
        prepared.packed,
        [Section("Files", table(_file_rows(document["data"]), f"assessment/logs at commit {COMMIT}"))],
    )


def _opening(experiments: Mapping[str, Mapping[str, Any]]) -> str:
    """What the chart of the accuracies shows, in a sentence."""
    off = {name: abs(e["recomputed_accuracy"] - e["published_accuracy"]) for name, e in experiments.items()}
    other = [name for name, distance in off.items() if distance >= 1e-4]  # the paper cuts its digits or rounds them
    automatic = [name for name, e in experiments.items() if not e["manual_published"]]
    return (
        f"Of {len(off)} accuracies that the paper prints, {len(off) - len(other)} are what its logs come to"
        + (f", and not those of {listed(other)}" if other else "")
        + (f"; the hand decisions behind {listed(automatic)} were not published" if automatic else "")
        + "."
    )


def _finding_list(findings: Sequence[dict[str, Any]]) -> str:
    """The findings under their numbers in docs/errata.md."""
    lines = (f"<li value={finding['number']}>{escape(finding['text'])}</li>\n" for finding in findings)
    return f"<ol class=findings>\n{''.join(lines)}</ol>\n"


def _file_rows(data: Mapping[str, bool]) -> list[tuple[str, ...]]:
    return [
        ("File", "As published", "SHA-256 of the published file"),
        *((file, "yes" if published else "no", SHA256[file]) for file, published in data.items()),
    ]
