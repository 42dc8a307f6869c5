"""The published assessment logs, scored again: counts, rules, hand decisions, statistics, and what contradicts what.

Source: assessment/logs/*.csv and assessment/assess.ipynb of the paper's repository, at `published.COMMIT`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from html import escape
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kd.assess.extract import RULE_SETS, extract, extract_one, without_prompt
from kd.assess.rules.documented import RULES, answer_is
from kd.assess.rules.notebook import spelled
from kd.assess.rules.rule import Extraction
from kd.assess.score import BY_HAND
from kd.dataset import final_answer
from kd.distill.alignment import published_teacher_order
from kd.errors import UserError
from kd.files import read_table, whole_folder, write_json, write_text
from kd.progress import progress
from kd.published import COMMIT, LOGS, RESULTS, SHA256, TRUTH, is_published
from kd.report import plots
from kd.report.explorer import Question, Responses, pack
from kd.report.page import Section, folded, page, table
from kd.report.statistics import compare_pairs, wilson_interval
from kd.report.tables import PAIRS_TITLE, aligned, pair_rows

SEED = 1
TRAIN_ROWS = 2638
DECISION = "model_ex1"
SLOW = "math-verify"
COUNTED = "as published: notebook's rules, then by hand"


@dataclass(frozen=True)
class Log:
    """One published log: responses without their prompts, questions and worked answers, true answers, and per row the
    number the authors took (None for the log that was published raw)."""

    responses: list[str]
    questions: list[str]
    worked: list[str]
    truth: list[str]
    decided: list[str] | None
    tokens: list[int]
    reached_limit: list[bool]


@dataclass(frozen=True)
class Prepared:
    """What the page needs that takes a while and can be had before the slow rule set is done: the responses, packed,
    and charts, drawn."""

    questions: int
    packed: str
    agreement: tuple[plots.Chart, str]
    length: tuple[plots.Chart, str]


def audit(data: Path, folder: Path | None = None) -> dict[str, Any]:
    """Score the logs in the folder `data` again; the document that `kd audit --json` prints. Where a `folder` is
    given, audit.json, audit.txt, charts and the page are written into it."""
    logs = {name: read_log(data, name) for name in LOGS}
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["math_verify"])  # takes seconds to import: once for all of them
    responses = [response for log in logs.values() for response in log.responses]
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=processes) as pool:
        # Math-Verify takes milliseconds a row, so it runs beside everything else.
        slow = pool.map(extract_one, responses, repeat(SLOW), chunksize=128)
        extractions = {
            name: {rules: list(extract(log.responses, rules)) for rules in RULE_SETS if rules != SLOW}
            for name, log in logs.items()
        }
        right = {name: rows_right(log, extractions[name]["notebook"]) for name, log in logs.items()}
        comparisons = [asdict(pair) for pair in compare_pairs(right, SEED)]
        prepared = _prepare(logs, extractions, right) if folder else None
        found = iter(progress(slow, f"audit, {SLOW}", "row", len(responses)))
        for name, log in logs.items():
            extractions[name][SLOW] = list(islice(found, len(log.responses)))
    experiments = {name: score(name, log, extractions[name]) for name, log in logs.items()}
    document = {
        "data": {file: is_published(data / file) for file in sorted([*LOGS.values(), TRUTH])},
        "experiments": experiments,
        "comparisons": comparisons,
        "findings": findings(logs, extractions, experiments),
    }
    if folder and prepared:
        _write(document, prepared, folder)
    return document


def read_log(data: Path, experiment: str) -> Log:
    """One experiment's log, checked against the published test set."""
    path = data / LOGS[experiment]
    raw = experiment == "confidence-kd"
    columns = ["question", "answer", "model_answer", "model_output_tokens", "model_max_tokens"]
    rows = _read(path, columns if raw else [*columns, DECISION])
    test_set = _read(data / TRUTH, ["question", "answer", "extracted_answer"])
    if len(rows) != len(test_set):
        raise UserError(f"{path}: {len(rows)} rows where the test set ({data / TRUTH}) has {len(test_set)}")
    for number, (row, known) in enumerate(zip(rows, test_set, strict=True), start=1):
        if (row["question"], row["answer"]) != (known["question"], known["answer"]):
            raise UserError(f"{path} row {number}: another question or answer than row {number} of {data / TRUTH}")
    return Log(
        responses=[without_prompt(row["model_answer"], row["question"] if raw else "") for row in rows],
        questions=[row["question"] for row in test_set],
        worked=[row["answer"] for row in test_set],
        truth=[_truth(data / TRUTH, number, row) for number, row in enumerate(test_set, start=1)],
        decided=None if raw else [_number(path, n, DECISION, row) for n, row in enumerate(rows, start=1)],
        tokens=[int(float(_number(path, n, "model_output_tokens", row))) for n, row in enumerate(rows, start=1)],
        reached_limit=[row["model_max_tokens"] == "True" for row in rows],
    )


def rows_right(log: Log, automatic: list[Extraction]) -> list[bool]:
    """Which rows count as correct: by the authors' decisions or, in the raw log, by their automatic rules alone."""
    taken: Sequence[str | None] = log.decided or [found.answer for found in automatic]
    return [answer == truth for answer, truth in zip(taken, log.truth, strict=True)]


def score(name: str, log: Log, extractions: dict[str, list[Extraction]]) -> dict[str, Any]:
    """One experiment's part of the document."""
    automatic = extractions["notebook"]
    settled = [i for i, found in enumerate(automatic) if found.answer is not None]
    left = [i for i, found in enumerate(automatic) if found.answer is None]
    recomputed = sum(rows_right(log, automatic))
    rule_sets = {rules: _rule_set(found, log.truth) for rules, found in extractions.items()}
    return {
        "n": len(log.truth),
        "published_correct": RESULTS[name].correct,
        "published_accuracy": RESULTS[name].accuracy / 100,
        "automatic": len(settled),
        "manual": len(left),
        "manual_published": log.decided is not None,
        "automatic_mismatches": (sum(automatic[i].answer != log.decided[i] for i in settled) if log.decided else None),
        "recomputed_correct": recomputed,
        "recomputed_accuracy": recomputed / len(log.truth),
        "interval": wilson_interval(recomputed, len(log.truth)),
        "documented_correct": rule_sets["documented"]["correct"],
        "robust_correct": rule_sets["robust"]["correct"],
        "rules": by_rule(automatic, log.truth),
        "rule_sets": rule_sets,
        "agreement_with_hand": {
            rules: sum((found[i].answer or "-1") == log.decided[i] for i in left)
            for rules, found in extractions.items()
            if log.decided is not None
        },
    }


def by_rule(extractions: Iterable[Extraction], truth: list[str]) -> dict[str, dict[str, int]]:
    """How many rows each single rule settles, and how many of them correctly."""
    rules = {rule: {"rows": 0, "correct": 0} for rule in RULES}
    for found, true in zip(extractions, truth, strict=True):
        if found.answer is not None:
            rules[found.rule]["rows"] += 1
            rules[found.rule]["correct"] += found.answer == true
    return rules


def _rule_set(extractions: list[Extraction], truth: list[str]) -> dict[str, Any]:
    correct = sum(found.answer == true for found, true in zip(extractions, truth, strict=True))
    return {
        "correct": correct,
        "accuracy": correct / len(truth),
        "interval": wilson_interval(correct, len(truth)),
        "undecided": sum(found.answer is None for found in extractions),
    }


def findings(
    logs: Mapping[str, Log], extractions: dict[str, dict[str, list[Extraction]]], experiments: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the logs themselves show, numbered as in docs/errata.md."""
    found = {
        1: _printed_accuracy(experiments["fine-tuning"]),
        2: _impossible_count(experiments["confidence-kd"]),
        3: _unmatched_control(logs),
        4: _key_order(),
        9: _stale_variable(logs, {name: rules["notebook"] for name, rules in extractions.items()}),
        13: _first_lines(experiments),
        14: _format(logs, experiments),
    }
    return [{"number": number, "text": sentence} for number, sentence in found.items()]


def _printed_accuracy(result: dict[str, Any]) -> str:
    n, correct, printed = result["n"], result["recomputed_correct"], result["published_accuracy"]
    return (
        f"Fine-tuning: the log has {correct} of {n} correct, {correct / n:.2%}; the table prints {printed:.2%}, "
        f"which would be {printed * n:.0f}."
    )


def _impossible_count(result: dict[str, Any]) -> str:
    n, count, printed = result["n"], result["published_correct"], result["published_accuracy"]
    return (
        f"Confidence-KD: {count} of {n} is {count / n:.2%}; the table prints {printed:.2%}, which would be "
        f"{printed * n:.0f}. The automatic rules alone take {result['recomputed_correct']} right numbers from the raw "
        f"log and leave {result['manual']} rows to a person, so the count can lie between "
        f"{result['recomputed_correct']} and {result['recomputed_correct'] + result['manual']}."
    )


def _unmatched_control(logs: Mapping[str, Log]) -> str:
    limits = {name: max(log.tokens) for name, log in logs.items()}
    others = sorted({limit for name, limit in limits.items() if name != "no-distillation"})
    cut = sum(logs["no-distillation"].reached_limit)
    return (
        f"The no-distillation control answered in at most {limits['no-distillation']} tokens, all others in at most "
        f"{', '.join(map(str, others))}; {cut} of its {len(logs['no-distillation'].tokens)} responses were cut there."
    )


def _key_order() -> str:
    names = [f"Question {i}" for i in range(1, TRAIN_ROWS + 1)]
    kept = [name for name, met in zip(names, published_teacher_order(names), strict=True) if name == met]
    return (
        f"Keys of a safetensors file come sorted as text: of {TRAIN_ROWS} training questions, {len(kept)} "
        f"({', '.join(kept)}) meets its own teacher's logits."
    )


def _stale_variable(logs: Mapping[str, Log], extractions: dict[str, list[Extraction]]) -> str:
    rows = same = 0
    for name, log in logs.items():
        for response, found in zip(log.responses, extractions[name], strict=True):
            if found.rule == "answer-is":
                own = answer_is(response)
                rows += 1
                same += own is not None and own.answer == found.answer
    return (
        f'Rule 3 ("the answer is") settled {rows} rows of the six logs with a number from an earlier row\'s response; '
        f"in {same} of them that happens to be the number behind the row's own phrase."
    )


def _first_lines(experiments: dict[str, Any]) -> str:
    students = {name: e["rules"]["first-line"] for name, e in experiments.items() if name != "no-distillation"}
    counts = ", ".join(f"{name} {_share(rule)}" for name, rule in students.items())
    return f"Rule 2 (first line) is right in: {counts}."


def _format(logs: Mapping[str, Log], experiments: dict[str, Any]) -> str:
    students = {name: e["rules"] for name, e in experiments.items() if name != "no-distillation"}

    def shares(rule: str) -> str:
        counts = sorted((rules["boxed"]["rows"], name, rules[rule]) for name, rules in students.items())
        return ", ".join(f"{name} {_share(counted)}" for _, name, counted in counts)

    limit = min(sum(log.reached_limit) / len(log.tokens) for log in logs.values())
    return (
        f"Rule 1 (a box) is right in: {shares('boxed')}. Rule 4 (last number) is right in: {shares('last-number')}. "
        f"At least {limit:.1%} of each log's responses run into the token limit."
    )


def _share(rule: dict[str, int]) -> str:
    """Rows right of rows settled, and how much that is."""
    share = f" ({rule['correct'] / rule['rows']:.0%})" if rule["rows"] else ""
    return f"{rule['correct']} of {rule['rows']}{share}"


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
        f"{PAIRS_TITLE}\n" + aligned(pair_rows(document["comparisons"])),
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
    return [header, *((name, *(_share(rule) for rule in e["rules"].values())) for name, e in experiments.items())]


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


def _prepare(
    logs: dict[str, Log], extractions: dict[str, dict[str, list[Extraction]]], right: dict[str, list[bool]]
) -> Prepared:
    """Pack the responses and draw the charts that show nothing of the slow rule set."""
    first = next(iter(logs.values()))
    questions = [Question(*row) for row in zip(first.questions, first.worked, first.truth, strict=True)]
    responses = {name: _responses(log, extractions[name], right[name]) for name, log in logs.items()}
    answers = {name: [found.answer for found in one.taken[COUNTED]] for name, one in responses.items()}
    return Prepared(
        len(questions),
        pack(questions, responses),
        plots.drawn(plots.agreement_chart(answers, right)),
        plots.drawn(
            plots.length_chart(
                {name: log.tokens for name, log in logs.items()},
                {name: log.reached_limit for name, log in logs.items()},
            )
        ),
    )


def _write(document: dict[str, Any], prepared: Prepared, folder: Path) -> None:
    experiments = document["experiments"]
    counted = {name: e | {"accuracy": e["recomputed_accuracy"]} for name, e in experiments.items()}
    rule_sets = {name: {r: e["rule_sets"][r]["accuracy"] for r in RULE_SETS} for name, e in experiments.items()}
    charts = [
        plots.drawn(plots.accuracy_chart(counted)),
        prepared.agreement,
        plots.drawn(plots.rule_set_chart(rule_sets)),
        prepared.length,
    ]
    with whole_folder(folder) as work:
        write_json(work / "audit.json", document)
        write_text(work / "audit.txt", text(document))
        for chart, drawn in charts:
            plots.write_chart(chart, drawn, work)
        write_text(work / "index.html", _page(document, prepared, charts))


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
            rules: [one.answer == truth for one, truth in zip(found, log.truth, strict=True)]
            for rules, found in by_rules.items()
        },
    )


def _page(document: dict[str, Any], prepared: Prepared, charts: Sequence[tuple[plots.Chart, str]]) -> str:
    experiments = document["experiments"]
    pairs = table(pair_rows(document["comparisons"]), PAIRS_TITLE)
    return page(
        "The published logs, scored again",
        f"{prepared.questions} questions of GSM8K's test set and {len(experiments)} experiments of arXiv 2412.17846; "
        f"logs of its repository at commit {COMMIT[:12]}.",
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
        charts,
        prepared.packed,
        [Section("Files", table(_file_rows(document["data"]), f"assessment/logs at commit {COMMIT}"))],
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


def _read(path: Path, columns: list[str]) -> list[dict[str, str]]:
    if not path.exists():
        raise UserError(f"{path}: no such file; `kd data fetch` brings the published logs to data/published")
    return read_table(path, columns)


def _truth(path: Path, number: int, row: dict[str, str]) -> str:
    true, behind_marks = _number(path, number, "extracted_answer", row), final_answer(row["answer"])
    if behind_marks is None or spelled(float(behind_marks)) != true:
        raise UserError(f"{path} row {number}: extracted_answer {true} is not the number behind #### in its answer")
    return true


def _number(path: Path, number: int, column: str, row: dict[str, str]) -> str:
    try:
        return spelled(float(row[column]))
    except ValueError:
        raise UserError(f"{path} row {number}: {column} is {row[column]!r}, expected a number") from None
