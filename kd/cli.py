"""`kd <command>`: the stages of the pipeline. Heavy libraries are imported only by the stage that runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import UserError, WorkFailedError
from kd.io.stopping import Terminated, signals_stop, system_error
from kd.io.text import printable
from kd.scoring.extract import RULE_SETS, STANDARD_INPUT

if TYPE_CHECKING:
    from kd.config import Config
    from kd.scoring.rules.rule import Extraction

PIPELINE = "dvc.yaml"
# A study's processes: TensorFloat-32 products (bfloat16's speed at float32's range), which torch reads as it is
# imported, and one thread each.
STUDY_ENVIRONMENT = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

COMPLETING = "_ARGCOMPLETE"  # set by the shell that asks how a command may go on
ESCAPED = "backslashreplace"
MOST_PROBLEMS = 9  # of a params file that `kd` alone shows
LONG = 5000  # rows, from which on `kd extract` shows progress

EPILOG = """\
The stages in order, as `dvc repro` runs them:
  kd inputs                  what data and models there are; what is wrong with them is said now
  kd prepare                 the rows of GSM8K, or of the built-in miniature
  kd head                    the teacher's output head, kept once
  kd teacher teacher         the teacher reads the questions behind a prompt
  kd train teacher-kd        a student learns from that prompt's teacher
  kd assess teacher-kd       what came of it answers the test questions
  kd statistics              how sure the teacher is behind each prompt
  kd report                  the paper's table
  kd attention               how each student attends, layer by layer, and how sure it is

`kd` alone says what is here and what to do next.
What runs is params.yaml; results lie under artifacts/<profile>/. To switch, `cp profiles/paper.yaml params.yaml`
(keep a params.yaml of your own elsewhere first), or let `nox -s paper` do it and run it.
A student is trained and assessed once for each of `seeds`, one after another; teacher-kd-1 is its run with seed 1.
Beside them:
  kd review teacher-kd-1     decide the responses that no rule settles
  kd extract log.csv --column model_answer --rules robust
  kd data fetch && kd audit  the paper's own logs, scored again
  kd students                all students and assessments side by side, one a GPU or core, after what they need
  kd doctor                  has this machine what the profile needs?
  kd rehearse --price 12     what the profile takes here: memory, disk, time, money
  kd models fetch            the profile's teacher and student from the Hub, resumable
  kd search teacher-kd       alpha and T by Bayesian search
  kd measure teacher-kd      how well it predicts the test answers, and how far it is from its teacher
  kd store inspect PATH      what a teacher store holds, every file verified
  kd publish crate FILE      the results as one zip for an archive; `kd publish verify FILE` checks it anywhere
  kd publish hub OWNER/NAME  adapters and results for the Hugging Face Hub; first a list of what would go
  kd publish samples FOLDER  the logs as lm-evaluation-harness's per-sample files
  kd study run FOLDER        a study, many runs over conditions and seeds, on this machine or a Dask cluster

Exit status: 0 done, 1 the work failed, 2 unusable input (the message says what, where and how to mend it).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status."""
    _show_any_text()
    line = parser()
    if COMPLETING in os.environ:
        from kd.completion import complete

        complete(line)
    options = line.parse_args(arguments)
    try:
        with signals_stop():
            return (_version if options.version else options.run)(options) or 0
    except UserError as error:
        print(f"kd: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `kd audit | head`: nobody reads on, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except WorkFailedError as error:
        print(f"kd: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"kd: {printable(system_error(error))}; then run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        kept = str(stop) or "earlier results are as they were, run the same command again"
        terminated = isinstance(stop, Terminated)
        print(f"kd: {'terminated' if terminated else 'interrupted'}; {kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _show_any_text() -> None:
    """What the terminal's or pipe's encoding does not have is shown, and read, as an escape instead of failing."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != ESCAPED:
            stream.reconfigure(errors=ESCAPED)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="kd",
        description="Reproduce response-priming distillation (arXiv 2412.17846).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="store_true", help="print version, commit and pins, and whether they are met")
    root.set_defaults(run=_next_step)
    commands = root.add_subparsers(metavar="COMMAND")
    _add_stages(commands)
    _add_extract(commands)
    _add_audit(commands)
    _add_data(commands)
    _add_models(commands)
    _add_store(commands)
    _add_study(commands)
    _add_students(commands)
    _add_publish(commands)
    return root


def _add_configured(
    commands: Any, name: str, run: Callable[[Config, argparse.Namespace], bool | None], text: str, record: str = ""
) -> argparse.ArgumentParser:
    """A command that reads the params file. What it makes has a `record` of that name, with options' values in braces;
    it makes nothing where `run` returns False."""

    def with_config(options: argparse.Namespace) -> None:
        from kd.config import load_config

        _insist_on_checkout(options.params)
        config, began = load_config(options.params), datetime.now().astimezone()
        if run(config, options) is not False and record:
            from kd.machine.record import write_record

            write_record(config, record.format_map(vars(options)), began)

    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.add_argument("--params", type=Path, default=Path("params.yaml"), help="the experiment (params.yaml)")
    sub.set_defaults(run=with_config)
    return sub


def _add_stages(commands: Any) -> None:
    stage = partial(_add_configured, commands)

    stage("inputs", _inputs, "check the data and the models that params name, and write what they are", "inputs")
    stage("prepare", _prepare, "write the training and test rows to artifacts/<profile>/data", "prepare")
    stage("head", _head, "keep the teacher's final norm and output head, once for all prompts", "head")
    teacher = stage("teacher", _teacher, "capture the teacher's states behind one prompt", "teacher/{prompt}")
    teacher.add_argument("prompt", metavar="PROMPT", help="one of `prompts`, such as base")
    train = stage("train", _train, "train a student's adapter, with each of `seeds` or with one")
    train.add_argument("student", metavar="STUDENT", help="such as teacher-kd, or with one seed, teacher-kd-1")
    assess = stage("assess", _assess, "let a student, trained or not, answer the test questions")
    assess.add_argument("student", metavar="STUDENT", help="such as no-distillation, teacher-kd or teacher-kd-1")
    way = assess.add_mutually_exclusive_group()
    way.add_argument("--exact", action="store_true", help="generate one row at a time, as the original did")
    way.add_argument(
        "--compare",
        metavar="N",
        type=_count,
        help="answer the first N questions both ways and print how many responses and answers are identical",
    )
    assess.add_argument("--json", action="store_true", help="with --compare, print one JSON document")
    doctor = stage("doctor", _doctor, "check whether this machine has what the profile needs")
    doctor.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    rehearse = stage(
        "rehearse",
        _rehearse,
        "what the experiment takes on this machine, tried on random weights of its models' shapes",
    )
    rehearse.description = (
        "Does a part of every stage's work by the stage's own code, on random weights of the models' shapes (nothing "
        "is downloaded but a config.json that is not known), and reckons memory, disk, time and price of the whole. It "
        "says nothing of results. Exit status 1 where something does not fit."
    )
    rehearse.add_argument("--price", metavar="P", type=_price, help="of an hour of this machine, in any currency")
    rehearse.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    statistics = stage("statistics", _statistics, "measure how sure the teacher is behind each prompt", "statistics")
    statistics.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    search = stage(
        "search",
        _search,
        "search alpha and T for one student: Bayesian, over several seeds, resumable, by many processes",
        "search/{student}",
    )
    search.add_argument("student", metavar="STUDENT", help="one that has a teacher, such as teacher-kd")
    search.add_argument("--storage", metavar="URL", help="a database that several hosts share (an SQLite file)")
    search.add_argument("--on-test", action="store_true", help="judge on the test split, as the original did; unfair")
    search.add_argument("--json", action="store_true", help="print best.json")
    measure = stage(
        "measure",
        _measure,
        "measure a student's loss on the test answers and its distance from its teacher",
    )
    measure.add_argument("student", metavar="STUDENT", help="such as teacher-kd, or with one seed, teacher-kd-1")
    measure.add_argument("--json", action="store_true", help="print one JSON document, of one run")
    report = stage("report", _report, "score every log, write the report and print the table", "report")
    report.add_argument("--json", action="store_true", help="print results.json, not the tables")
    attention = stage(
        "attention", _attention, "measure how each student attends and how sure it is of each next token", "attention"
    )
    attention.add_argument(
        "--heads",
        metavar="L:H,…",
        type=_heads,
        help="draw these heads (layer:head, both from 0) on the first question instead, one image each",
    )
    review = stage("review", _review, "decide by hand the responses of one run that no rule settles")
    review.description = (
        "Shows each undecided response with its numbers highlighted and takes a number, `none`, `skip` or `quit`. "
        "Each is saved at once to reviews/RUN.csv; the next call goes on there, and `kd report` counts it."
    )
    review.add_argument("run_name", metavar="RUN", help="such as teacher-kd-1, or no-distillation")
    sheet = review.add_mutually_exclusive_group()
    sheet.add_argument("--export", metavar="FILE", type=Path, help="write the undecided rows to a CSV file to fill in")
    sheet.add_argument("--import", metavar="FILE", type=Path, dest="sheet", help="take the answers of such a file")


def _add_extract(commands: Any) -> None:
    text = "take the answer from each response in a CSV or JSON lines file, and score it"
    sub = commands.add_parser(
        "extract",
        help=text,
        description=f"{text}. Prints row, answer and rule as tab-separated values, with --truth also the true answer "
        "and whether the two are equal; no answer means that no rule of the set finds one. docs/extraction.md "
        "describes the rule sets.",
    )
    sub.add_argument("file", metavar="FILE", type=_file_or_input, help="a .csv, .jsonl or .ndjson file; - is stdin")
    sub.add_argument("--column", metavar="NAME", required=True, help="the column or key that holds the responses")
    sub.add_argument("--rules", choices=RULE_SETS, default="documented", help="the rule set (documented)")
    sub.add_argument(
        "--prompt-column",
        metavar="NAME",
        help="take this column's text off the front of each response, and white space off both ends",
    )
    sub.add_argument(
        "--truth",
        metavar="COLUMN",
        help="score against this column: numbers, or GSM8K's answers that end in `####` and a number",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON list of {row, answer, rule}")
    sub.set_defaults(run=_extract)


def _add_audit(commands: Any) -> None:
    text = "score the paper's own assessment logs again"
    sub = commands.add_parser("audit", help=text, description=f"{text} (`kd data fetch` brings them)")
    sub.add_argument("--data", metavar="DIR", type=Path, default=Path("data/published"), help="data/published")
    sub.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    sub.add_argument(
        "--output", metavar="DIR", type=Path, help="also write audit.json, audit.txt and a page, index.html"
    )
    sub.set_defaults(run=_audit)


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="the paper's published files").add_subparsers(
        metavar="COMMAND", required=True
    )
    text = "bring the paper's assessment logs to data/published, checksums verified"
    sub = data.add_parser("fetch", help=text, description=text)
    sub.add_argument("--source", metavar="URL", help="a mirror of the original's assessment/logs folder")
    sub.set_defaults(run=_fetch)


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="the teacher and the student").add_subparsers(
        metavar="COMMAND", required=True
    )
    text = "bring the teacher and the student to this machine, checksums verified; goes on where it was stopped"
    sub = _add_configured(models, "fetch", _models_fetch, text)
    sub.epilog = (
        "Models of the Hub come at their pinned revisions into its cache, which HF_HUB_CACHE moves to another disk. "
        "HF_TOKEN is the token for models that ask for one, HF_ENDPOINT a mirror."
    )


def _add_store(commands: Any) -> None:
    store = commands.add_parser("store", help="look into a teacher store, or exchange it with other tools")
    commands = store.add_subparsers(metavar="COMMAND", required=True)
    text = "verify every file of a store and say what it holds"
    sub = commands.add_parser("inspect", help=text, description=text)
    sub.add_argument("path", metavar="PATH", type=Path, help="such as artifacts/mini/teacher/base")
    sub.add_argument("--json", action="store_true", help="print one JSON document")
    sub.set_defaults(run=_store_inspect)
    text = "write a store's logits as the notebooks' one safetensors file, or the largest in DistillKit's format"
    sub = commands.add_parser("export", help=text, description=text)
    sub.add_argument("path", metavar="PATH", type=Path, help="such as artifacts/mini/teacher/base")
    sub.add_argument("file", metavar="FILE", type=Path, help="the file to write, or DistillKit's folder")
    sub.add_argument("--format", choices=("notebooks", "distillkit"), default="notebooks", help="notebooks")
    sub.add_argument("--top-k", metavar="N", type=_count, help="of DistillKit's format, logits of a token (128)")
    sub.set_defaults(run=_store_export)
    text = "write what the teacher reads as token ids, JSON lines that are vLLM's prompts"
    sub = _add_configured(commands, "tokens", _store_tokens, text)
    sub.add_argument("file", metavar="FILE", type=Path, help="the file to write, such as base.jsonl")
    sub.add_argument("--prompt", metavar="NAME", required=True, help="the prompt to read the questions behind")
    text = "make a store of the notebooks' one safetensors file, or of the hidden states that vLLM extracts"
    sub = _add_configured(commands, "import", _store_import, text)
    sub.add_argument("file", metavar="FILE", type=Path, help="the notebooks' file, or the folder of vLLM's files")
    sub.add_argument("path", metavar="PATH", type=Path, help="the store to make, such as artifacts/paper/teacher/base")
    sub.add_argument("--prompt", metavar="NAME", required=True, help="the prompt that it was captured with")
    sub.add_argument("--format", choices=("notebooks", "vllm"), default="notebooks", help="notebooks")


def _add_study(commands: Any) -> None:
    text = "run a study: students over conditions and seeds, compared by tests that are stated before"
    study = commands.add_parser("study", help=text, description=text).add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = study.add_parser(name, help=text, description=text)
        sub.add_argument("folder", metavar="FOLDER", type=Path, help="such as studies/priming")
        if run is not _study_tables:
            sub.add_argument("--work", metavar="DIR", type=Path, help="where its results lie (FOLDER/work)")
        sub.set_defaults(run=run)
        return sub

    begin = add("run", _study_run, "do what is missing, several tasks at a time")
    where = begin.add_mutually_exclusive_group()
    where.add_argument("--jobs", metavar="N", type=_count, help="tasks at a time (6 for each GPU, or 1 without any)")
    where.add_argument("--scheduler", metavar="ADDRESS", help="a Dask cluster that shares this file system")
    begin.add_argument("--minutes", metavar="M", type=_minutes, help="stop after so long; the same command goes on")
    one = add("task", _study_task, "do one task, in this process")
    one.add_argument("name", metavar="TASK", help="as said/ names it: rate/base-kd-1")
    add("results", _study_results, "write results.json, the README's tables and figures, and logs/ for DVC")
    tables = add("tables", _study_tables, "check results.json, fill the README anew from it and print the tables")
    tables.add_argument("--json", action="store_true", help="print the summary of results.json, not the tables")


def _add_students(commands: Any) -> None:
    text = "train and assess all students side by side, one a GPU or, without any, a core"
    sub = commands.add_parser(
        "students",
        help=text,
        description=f"{text}: whatever of them is out of date, and before them what they need, as `dvc repro` would. "
        "What one of several says stands behind its name; one that fails does not stop the others.",
    )
    sub.add_argument(
        "--jobs",
        metavar="N",
        type=_count,
        help="students at a time (as many as GPUs, or as cores and memory without any)",
    )
    sub.set_defaults(run=_students)


def _add_publish(commands: Any) -> None:
    text = "results that others can cite, load and check"
    publish = commands.add_parser("publish", help=text, description=text).add_subparsers(
        metavar="COMMAND", required=True
    )
    _add_crate(publish)
    _add_hub(publish)
    _add_samples(publish)


def _add_crate(publish: Any) -> None:
    text = "pack the profile's results into one zip for an archive, described as a Workflow Run RO-Crate"
    make = _add_configured(publish, "crate", _publish_crate, text)
    make.add_argument("file", metavar="FILE", type=Path, help="the zip to write, such as kd-mini.zip")
    make.add_argument("--with-stores", action="store_true", help="the teacher's captures too, which may be large")
    text = "check a crate: its checksums, and its table, computed again from its logs"
    check = publish.add_parser("verify", help=text, description=text)
    check.add_argument("file", metavar="FILE", type=Path, help="a zip that `kd publish crate` made")
    check.set_defaults(run=_publish_verify)


def _add_hub(publish: Any) -> None:
    text = "list what would go to the Hugging Face Hub: adapters and results, with cards; --upload sends it"
    sub = _add_configured(publish, "hub", _publish_hub, text)
    sub.add_argument("repository", metavar="REPOSITORY", help="OWNER/NAME of the results; adapters: OWNER/NAME-<run>")
    sub.add_argument("--upload", action="store_true", help="send what the Hub has not, with the token in HF_TOKEN")
    sub.add_argument("--base-model", metavar="OWNER/NAME", help="what the Hub calls a student from a folder")


def _add_samples(publish: Any) -> None:
    text = "write every run's log as lm-evaluation-harness's per-sample files, with its results file"
    sub = _add_configured(publish, "samples", _publish_samples, text)
    sub.add_argument("folder", metavar="FOLDER", type=Path, help="where each run has a folder, as there each model has")


def _insist_on_checkout(params: Path) -> None:
    """Refuse to work beside a checkout instead of in it, and with other code than the checkout's, which dvc.lock would
    then name for results that it has not made."""
    top = params.parent.resolve()
    if (top / PIPELINE).exists() and top != Path.cwd():
        raise UserError(f"{params}: results lie where kd is started; go to {top} and leave --params out")
    code = Path("kd").absolute()
    if Path(PIPELINE).exists() and (code / "cli.py").exists() and not code.samefile(Path(__file__).parent):
        raise UserError(
            f"{code}: not the code that runs, which is {Path(__file__).parent}; in this checkout type `python -m kd` "
            "instead of `kd`, or let `nox` make its own environment"
        )


def _version(_: argparse.Namespace) -> None:
    from kd.machine.version import text

    _print(text())


def _next_step(_: argparse.Namespace) -> None:
    from kd.config import load_config
    from kd.machine.next_step import PARAMS, next_step, without_params

    try:
        if PARAMS.exists():
            _insist_on_checkout(PARAMS)
            lines = next_step(load_config(PARAMS))
        else:
            lines = without_params()
    except UserError as error:  # which every command would end with; here it is the answer
        lines = ["Next, mend this:", *str(error).splitlines()[:MOST_PROBLEMS]]
    _print("\n".join(lines))


def _inputs(config: Config, _: argparse.Namespace) -> None:
    from kd.inputs import write_inputs

    write_inputs(config)


def _prepare(config: Config, _: argparse.Namespace) -> None:
    from kd.data.gsm8k import prepare

    if config.needs.gpus:  # before hours of work on a machine that cannot do it; what is written depends on none of it
        from kd.machine.doctor import examine, insist, text

        print(text(checks := examine(config)), end="", file=sys.stderr)
        insist(checks)
    prepare(config.dataset, config.artifacts / "data")


def _head(config: Config, _: argparse.Namespace) -> None:
    from kd.teacher.capture import keep_head

    keep_head(config)


def _teacher(config: Config, options: argparse.Namespace) -> bool:
    from kd.config import choose

    choose(options.prompt, config.prompts, "prompt", "prompts")
    from kd.io.distributed import launch

    launch(config.launcher)
    from kd.teacher.capture import capture

    return capture(config, options.prompt)


def _train(config: Config, options: argparse.Namespace) -> None:
    from kd.config import runs_named

    made = {run: config.artifacts / "adapters" / run for run in runs_named(options.student, config.adapters)}
    from kd.distill.train import run_key, train
    from kd.io.files import in_turn
    from kd.machine.record import recorded

    with closing(in_turn(options.student, made, partial(run_key, config))) as runs:
        for run in runs:
            with recorded(config, f"train/{run}"):
                train(config, run)


def _assess(config: Config, options: argparse.Namespace) -> None:
    from kd.config import run_named, runs_named

    if options.compare:
        run = run_named(options.student, config.experiments)
        from kd.assess.run import compare, comparison_text

        compared = compare(config, run, options.compare)
        _print(_json(compared) if options.json else comparison_text(compared))
        return
    names = runs_named(options.student, config.experiments)
    from kd.io.distributed import launch, this_process

    launch(config.launcher)
    from kd.assess.run import assess, log_key
    from kd.io.files import in_turn
    from kd.machine.record import recorded
    from kd.scoring.log import log_file

    made = {run: log_file(config, run) for run in names}
    key = partial(log_key, config, exact=options.exact)
    with closing(in_turn(options.student, made, key, this_process())) as runs:
        for run in runs:
            with recorded(config, f"assess/{run}"):
                assess(config, run, exact=options.exact)


def _doctor(config: Config, options: argparse.Namespace) -> None:
    from kd.machine.doctor import document, examine, insist, text

    checks = examine(config)
    _print(_json(document(config, checks)) if options.json else text(checks))
    insist(checks)


def _rehearse(config: Config, options: argparse.Namespace) -> None:
    from kd.machine.rehearse import insist, rehearse, text

    document = rehearse(config, options.price)
    _print(_json(document) if options.json else text(document))
    insist(document)


def _statistics(config: Config, options: argparse.Namespace) -> None:
    from kd.analysis.certainty import measure_prompts
    from kd.report.tables import aligned, prompt_rows

    found = measure_prompts(config)
    _print(_json(found) if options.json else aligned(prompt_rows(found)))


def _search(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.student, config.students, "student", "prompts")
    from kd.distill.search import recommendation, search

    best = search(config, options.student, options.storage, options.on_test)
    _print(_json(best) if options.json else recommendation(best))


def _measure(config: Config, options: argparse.Namespace) -> None:
    from kd.config import run_named, runs_named

    one = [run_named(options.student, config.experiments)] if options.json else None
    names = one or runs_named(options.student, config.experiments)
    from kd.analysis.test_loss import measure
    from kd.machine.record import recorded

    for run in names:
        with recorded(config, f"measure/{run}"):
            measured = measure(config, run)
        _print(_json(measured) if options.json else "\n".join(f"{run}: {key} {measured[key]}" for key in measured))


def _report(config: Config, options: argparse.Namespace) -> None:
    from kd.report.run import report
    from kd.report.tables import table

    results = report(config)
    _print(_json(results) if options.json else table(results))


def _attention(config: Config, options: argparse.Namespace) -> bool:
    from kd.report.attention import analyse, draw_heads, summary_rows
    from kd.report.tables import aligned

    if options.heads:
        _print("\n".join(map(str, draw_heads(config, options.heads))))
        return False
    _print(aligned(summary_rows(analyse(config))))
    return True


def _review(config: Config, options: argparse.Namespace) -> None:
    from kd.config import run_named
    from kd.scoring import review
    from kd.scoring.log import open_rows

    run = run_named(options.run_name, config.experiments)
    rows, path = open_rows(config, run), review.reviews_file(run)
    if options.export:
        review.export_sheet(rows, review.read_decisions(path), options.export)
        print(f"{options.export}: {len(rows)} rows; fill in `answer` and --import it", file=sys.stderr)
    elif options.sheet:
        taken = review.import_sheet(rows, path, options.sheet)
        print(f"{path}: {taken} answers taken from {options.sheet}", file=sys.stderr)
    else:
        review.review(rows, path)


def _extract(options: argparse.Namespace) -> None:
    from kd.data.number import equal
    from kd.io.progress import progress
    from kd.scoring.extract import extract, read_responses

    read = read_responses(options.file, options.column, options.prompt_column, options.truth)
    found: Iterable[Extraction] = extract(read.texts, options.rules)
    if len(read.texts) >= LONG:
        found = progress(found, f"extract, {options.rules}", "row", len(read.texts))
    rows: list[dict[str, Any]] = [
        {"row": row, "answer": one.answer, "rule": one.rule} for row, one in enumerate(found, start=1)
    ]
    for row, truth in zip(rows, read.truths or [], strict=False):
        row |= {"truth": truth, "correct": equal(row["answer"], truth)}
    if options.json:
        _print(_json(rows))
    else:
        columns = ["row", "answer", "rule"] + ["truth", "correct"] * (read.truths is not None)
        lines = (["" if row[column] is None else str(row[column]) for column in columns] for row in rows)
        _print("\n".join("\t".join(cells) for cells in (columns, *lines)))
    if read.truths:
        print(_tally(rows), file=sys.stderr)


def _tally(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows are right, for a person."""
    from kd.scoring.significance import wilson_interval

    right, undecided = sum(row["correct"] for row in rows), sum(row["answer"] is None for row in rows)
    low, high = wilson_interval(right, len(rows))
    return (
        f"{right} of {len(rows)} right, {right / len(rows):.2%} (95 % interval {low:.2%} to {high:.2%}); "
        f"{undecided} without an answer"
    )


def _audit(options: argparse.Namespace) -> None:
    from kd.audit.page import text
    from kd.audit.run import audit

    document = audit(options.data, options.output)
    _print(_json(document) if options.json else text(document))


def _fetch(options: argparse.Namespace) -> None:
    from kd.audit.logs import DATA, SOURCE, fetch

    fetched = fetch(source=options.source or SOURCE)
    print(f"{DATA}: {', '.join(fetched) + ' fetched' if fetched else 'all files are there'}", file=sys.stderr)


def _models_fetch(config: Config, _: argparse.Namespace) -> None:
    from kd.models.load import fetch

    for role, done in fetch({"teacher": config.teacher.model, "student": config.student.model}).items():
        print(f"{role}: {done}", file=sys.stderr)


def _store_inspect(options: argparse.Namespace) -> None:
    from kd.teacher.inspect import inspect, text

    found = inspect(options.path)
    _print(_json(found) if options.json else text(found))


def _store_export(options: argparse.Namespace) -> None:
    if options.format == "distillkit":
        from kd.teacher.distillkit import TOP_K, export_top_k

        export_top_k(options.path, options.file, options.top_k or TOP_K)
        return
    if options.top_k:
        raise UserError("--top-k: the notebooks' file has every logit; leave it out, or add --format distillkit")
    from kd.teacher.exchange import export_logits

    export_logits(options.path, options.file)


def _store_import(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.prompt, config.prompts, "prompt", "prompts")
    if options.format == "vllm":
        from kd.teacher.vllm import import_states

        import_states(config, options.file, options.path, options.prompt)
        return
    from kd.teacher.exchange import import_logits

    import_logits(config, options.file, options.path, options.prompt)


def _store_tokens(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.prompt, config.prompts, "prompt", "prompts")
    from kd.teacher.vllm import write_tokens

    write_tokens(config, options.file, options.prompt)


def _study_run(options: argparse.Namespace) -> int:
    os.environ.update(STUDY_ENVIRONMENT)
    from kd.study.engine import run
    from kd.study.work import KEPT_ON_STOP, at_work

    with at_work(options.folder, options.work) as plan:
        try:
            return run(plan, options.scheduler, options.jobs, options.minutes)
        except KeyboardInterrupt as stop:
            raise type(stop)(KEPT_ON_STOP) from None


def _study_task(options: argparse.Namespace) -> int:
    os.environ.update(STUDY_ENVIRONMENT)
    from kd.study.work import at_work, do, end_with_worker

    end_with_worker()
    with at_work(options.folder, options.work) as plan:
        return do(plan, options.name, main)


def _study_results(options: argparse.Namespace) -> None:
    from kd.study.publish import publish
    from kd.study.work import at_work

    with at_work(options.folder, options.work) as plan:
        missing = publish(plan)
    if missing:
        print(f"kd: {len(missing)} of {len(plan.runs)} runs are missing, among them {missing[0]}", file=sys.stderr)


def _study_tables(options: argparse.Namespace) -> None:
    from kd.study.publish import read_published
    from kd.study.tables import text

    results = read_published(options.folder)
    _print(_json(results["summary"]) if options.json else text(results))


def _publish_crate(config: Config, options: argparse.Namespace) -> None:
    from kd.publish.crate import make_crate

    _print(make_crate(config, options.params, options.file, stores=options.with_stores))
    _say_folders(config)


def _publish_verify(options: argparse.Namespace) -> None:
    from kd.publish.verify import verify

    _print(verify(options.file))


def _publish_hub(config: Config, options: argparse.Namespace) -> None:
    from kd.publish.hub import plan, rows, upload
    from kd.report.tables import aligned

    repositories = plan(config, options.params, options.repository, options.base_model)
    if options.upload:
        _print(aligned(upload(repositories)))
        print(f"kd: to cite: {repositories[0].address} at revision {repositories[0].tag}", file=sys.stderr)
        return
    _print(aligned(rows(repositories)))
    _say_folders(config)
    print("kd: nothing was sent; --upload sends it, and repositories that it makes are public", file=sys.stderr)


def _say_folders(config: Config) -> None:
    """What one may not want to publish, and cannot see in a list of files."""
    from kd.publish.contents import folders

    if named := folders(config):
        print(f"kd: results and page name folders of this machine: {', '.join(named)}", file=sys.stderr)


def _publish_samples(config: Config, options: argparse.Namespace) -> None:
    from kd.publish.samples import write_samples

    written = write_samples(config, options.folder)
    print(f"{options.folder}: {len(written)} files of {len(config.experiments)} runs", file=sys.stderr)


def _file_or_input(text: str) -> Path:
    """A file given on the command line, or standard input."""
    return STANDARD_INPUT if text == "-" else Path(text)


def _students(options: argparse.Namespace) -> None:
    from kd.config import load_config
    from kd.machine.students import run

    params = Path("params.yaml")
    _insist_on_checkout(params)
    run(load_config(params), options.jobs)


def _price(text: str) -> float:
    """A number from 0 up given on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, such as 12.5, found {text!r}")
    return value


def _minutes(text: str) -> float:
    """A positive number given on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, found {text!r}")
    return value


def _count(text: str) -> int:
    """A positive whole number given on the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, found {text!r}")
    return int(text)


def _heads(text: str) -> list[tuple[int, int]]:
    """Heads given on the command line, "L:H,L:H": (layer, head) each."""
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(layer.isdecimal() and head.isdecimal() for layer, _, head in pairs):
        raise argparse.ArgumentTypeError(f"expected layer:head, as in 3:5,7:1, found {text!r}")
    return [(int(layer), int(head)) for layer, _, head in pairs]


def _json(document: Any) -> str:
    """One JSON document, in ASCII, which every terminal shows."""
    return json.dumps(document, indent=1, allow_nan=False)


def _print(document: str) -> None:
    """To stdout, with one line end behind it, and nothing in it that a terminal would obey."""
    print(printable(document.rstrip("\n")), flush=True)


if __name__ == "__main__":
    sys.exit(main())
