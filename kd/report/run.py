"""`kd report`: every log scored, and what is written of it: results.json, results.md, charts, and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd.config import Config
from kd.data.rows import final_answer
from kd.io.files import sha256, whole_folder, write_json, write_text
from kd.report import charts, tables
from kd.report.explorer import Question, Responses, pack
from kd.report.finding import comparability, finding
from kd.report.page import Section, folded, listing, page, paragraph, table
from kd.report.results import Curve, collect, read_curves, table_rows
from kd.scoring.extract import RULE_SETS, extract
from kd.scoring.log import Answered, is_correct, log_file, read_answered
from kd.scoring.rules.rule import Extraction

COUNTED = "as counted: documented rules, then by hand"
COUNTED_RULES = "documented"
# Math-Verify takes milliseconds a response and does not say where an answer stands.
READERS = [rules for rules in RULE_SETS if rules != "math-verify"]
PARAMS = ("profile", "seeds", "dataset", "teacher", "prompts", "controls", "untrained", "student", "distill", "assess")
LOSSES = "losses"  # the loss curve of each student, for DVC to plot whoever they are
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def report(config: Config) -> dict[str, Any]:
    """Score every experiment's log and write artifacts/<profile>/report; returns the results."""
    answered = {name: read_answered(config, run) for name, run in table_rows(config).items()}
    curves = read_curves(config)
    results = collect(config, answered, curves)
    responses = {name: _responses(rows) for name, rows in answered.items()}
    shown = [charts.drawn(chart) for chart in _charts(results, responses, curves)]
    with whole_folder(config.artifacts / "report") as work:
        write_json(work / "results.json", results)
        write_text(work / "results.md", tables.markdown(results))
        for chart, drawn in shown:
            charts.write_chart(chart, drawn, work)
        for student, curve in curves.items():
            (work / LOSSES).mkdir(exist_ok=True)
            write_text(work / LOSSES / f"{student}.tsv", _tsv(curve))
        questions = [_question(row) for row in next(iter(answered.values()))]
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
    results: dict[str, Any], responses: Mapping[str, Responses], curves: Mapping[str, Curve]
) -> Iterator[charts.Chart]:
    counted = {name: [found.answer for found in one.taken[COUNTED]] for name, one in responses.items()}
    right = {name: one.right[COUNTED] for name, one in responses.items()}
    yield charts.accuracy_chart(results["experiments"], results["control"])
    if curves:
        yield charts.loss_chart(curves)
    yield charts.agreement_chart(counted, right)
    yield charts.rule_set_chart(
        {name: {r: sum(one.right[r]) / len(one.texts) for r in READERS} for name, one in responses.items()}
    )
    yield charts.length_chart(
        {name: one.tokens for name, one in responses.items()}, {name: one.cut for name, one in responses.items()}
    )


def _tsv(curve: Curve) -> str:
    return "step\tloss\n" + "".join(f"{step}\t{loss}\n" for step, loss in curve)


def _results(results: dict[str, Any]) -> list[Section]:
    pairs = table(tables.pair_rows(results["comparisons"]), tables.PAIRS_TITLE)
    sections = [
        Section(
            "The experiments",
            table(tables.result_rows(results), "Test questions that are right") + listing(tables.notes(results)),
        ),
        Section("Pairs", folded("All pairs of experiments on the same questions", pairs)),
    ]
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
    params = [("Key", "Value"), *_flat(config.model_dump(include=set(PARAMS)))]
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
