"""`kd report`: every log scored, and what is written of it: results.json, results.md, charts, and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from kd.config import Config
from kd.data.rows import final_answer
from kd.io.files import sha256, whole_folder, write_json, write_text
from kd.report import charts, tables
from kd.report.explorer import Question, Responses, pack
from kd.report.finding import comparability, finding
from kd.report.page import Section, folded, listing, page, paragraph, table
from kd.report.reading import Curve, Run, read_runs
from kd.report.results import collect
from kd.scoring.extract import RULE_SETS, extract
from kd.scoring.log import Answered, is_correct, log_file
from kd.scoring.rules.rule import Extraction

COUNTED = "as counted: documented rules, then by hand"
COUNTED_RULES = "documented"
# Math-Verify takes milliseconds a response and does not say where an answer stands.
READERS = [rules for rules in RULE_SETS if rules != "math-verify"]
APART = {"needs", "search", "attention", "launcher"}  # params that shape none of the results
LOSSES = "losses"  # the loss curve of each student, for DVC to plot whoever they are
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def report(config: Config) -> dict[str, Any]:
    """Score every experiment's log and write artifacts/<profile>/report; returns the results."""
    runs = read_runs(config)
    results = collect(config, runs)
    responses = {name: {run.name: _responses(run.rows) for run in student} for name, student in runs.items()}
    curves = {run.name: run.curve for student in runs.values() for run in student if run.curve}
    shown = [charts.drawn(chart) for chart in _charts(results, responses, runs)]
    with whole_folder(config.artifacts / "report") as work:
        write_json(work / "results.json", results)
        write_text(work / "results.md", tables.markdown(results))
        for chart, drawn in shown:
            charts.write_chart(chart, drawn, work)
        for name, curve in curves.items():
            (work / LOSSES).mkdir(exist_ok=True)
            write_text(work / LOSSES / f"{name}.tsv", _tsv(curve))
        questions = [_question(row) for row in next(iter(runs.values()))[0].rows]
        write_text(
            work / "index.html",
            page(
                f"Response-priming distillation: {config.profile}",
                tables.setting(results),
                [finding(results), comparability(results)],
                _results(results),
                shown,
                pack(questions, responses),
                _provenance(config, results),
            ),
        )
    return results


def _question(row: Answered) -> Question:
    return Question(row.question, row.answer, final_answer(row.answer) or "")


def _responses(rows: Sequence[Answered]) -> Responses:
    """One experiment's rows as every reader reads them."""
    texts = [row.response for row in rows]
    by_rules = {rules: list(extract(texts, rules)) for rules in READERS}
    counted = [_counted(row, found) for row, found in zip(rows, by_rules[COUNTED_RULES], strict=True)]
    return Responses(
        texts,
        [row.tokens for row in rows],
        [row.reached_limit for row in rows],
        {COUNTED: counted} | by_rules,
        {COUNTED: [row.right for row in rows]}
        | {
            rules: [is_correct(found.answer, row.answer) for found, row in zip(taken, rows, strict=True)]
            for rules, taken in by_rules.items()
        },
    )


def _counted(row: Answered, found: Extraction) -> Extraction:
    """What the log holds, and where it stands if the rules still find the same there."""
    return Extraction(row.taken, row.rule, found.span if (found.answer, found.rule) == (row.taken, row.rule) else None)


def _charts(
    results: dict[str, Any], responses: Mapping[str, Mapping[str, Responses]], runs: Mapping[str, Sequence[Run]]
) -> Iterator[charts.Chart]:
    yield charts.accuracy_chart(results["experiments"], results["control"])
    fallen = tables.collapsed(results)
    called = {name: name + tables.MARK * (name in fallen) for name in runs}
    students = {called[name]: list(one.values()) for name, one in responses.items()}
    curves = {called[name]: [run.curve for run in student if run.curve] for name, student in runs.items()}
    for chart in _more_charts(students, {name: found for name, found in curves.items() if found}):
        yield replace(chart, caption=f"{chart.caption.removesuffix('.')}{tables.starred(results)}.")


def _more_charts(
    students: Mapping[str, Sequence[Responses]], curves: Mapping[str, Sequence[Curve]]
) -> Iterator[charts.Chart]:
    """Those behind the accuracies, of every student's runs."""
    if curves:
        yield charts.loss_chart(curves)
    counted = {
        name: [[found.answer for found in one.taken[COUNTED]] for one in student] for name, student in students.items()
    }
    right = {name: [one.right[COUNTED] for one in student] for name, student in students.items()}
    yield charts.agreement_chart(counted, right)
    yield charts.rule_set_chart(
        {
            name: {rules: fmean(fmean(one.right[rules]) for one in student) for rules in READERS}
            for name, student in students.items()
        }
    )
    yield charts.length_chart(
        {name: [length for one in student for length in one.tokens] for name, student in students.items()},
        {name: [cut for one in student for cut in one.cut] for name, student in students.items()},
    )


def _tsv(curve: Curve) -> str:
    return "step\tloss\n" + "".join(f"{step}\t{loss}\n" for step, loss in curve)


def _results(results: dict[str, Any]) -> list[Section]:
    title, pairs = tables.pair_table(results)
    sections = [
        Section(
            "The experiments",
            table(tables.result_rows(results), "Test questions that are right") + listing(tables.notes(results)),
        ),
        Section("Pairs", folded("All pairs of experiments on the same questions", table(pairs, title))),
    ]
    if tables.has_seeds(results):
        runs = table(tables.run_rows(results), "Test questions that are right, with each seed")
        sections.append(Section("Seeds", folded("Every run by itself", runs)))
    if results["check_losses"]:
        caption = "Mean cross entropy of answer token i at question position i, over the test rows"
        sections.append(
            Section("Check loss after training", table(tables.check_rows(results["check_losses"]), caption))
        )
    if results["prompts"]:
        caption = "The teacher's largest next-token probability, on average over every fifth question's positions"
        sections.append(
            Section("The teacher behind each prompt", table(tables.prompt_rows(results["prompts"]), caption))
        )
    return sections


def _provenance(config: Config, results: dict[str, Any]) -> list[Section]:
    params = [("Key", "Value"), *_flat(config.model_dump(exclude=APART))]
    versions = [("Result", "Libraries"), *_made_with(results["versions"])]
    about = (
        "The same parameters give the same bytes on one machine, so the artifacts record no times and no hardware; "
        f"{config.artifacts}/runs/ beside them does. dvc.lock ties these files to the commit that made them."
    )
    return [
        Section("Parameters", folded("params.yaml, as far as it shapes these results", table(params, "params.yaml"))),
        Section("Versions", table(versions, "What the adapters and captures were made with")),
        Section("Files", paragraph(about) + table(_checksums(config), "Files behind this report, by SHA-256")),
    ]


def _made_with(versions: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Iterator[tuple[str, str]]:
    """One row for all results of a kind that the same libraries made."""
    for kind, results in versions.items():
        said = {
            name: ", ".join(f"{library} {found}" for library, found in one.items()) for name, one in results.items()
        }
        for libraries in dict.fromkeys(said.values()):
            yield f"{kind}: {', '.join(name for name in said if said[name] == libraries)}", libraries


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters as dotted keys, in the file's order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else repr(value)


def _checksums(config: Config) -> list[tuple[str, ...]]:
    """The adapters and logs that are there."""
    adapters = (config.artifacts / "adapters" / name / file for name in config.adapters for file in ADAPTER_FILES)
    logs = (log_file(config, name) for name in config.experiments)
    found = [path for path in (*adapters, *logs) if path.exists()]
    return [("File", "Bytes", "SHA-256"), *((str(p), f"{p.stat().st_size:,}", sha256(p)) for p in found)]
