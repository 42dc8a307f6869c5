"""The results of a study, many runs over conditions and seeds: put together, summed up and checked.

All of it is one file, results.json; docs/study.md describes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from kd.config import Count, Name, Params, validated
from kd.errors import UserError
from kd.io.files import load_json
from kd.io.text import refuse_half_characters, refuse_no_numbers
from kd.report.packed import unpack_right
from kd.scoring.comparison import Right, accuracy_interval, compare_family

RULES = ("documented", "robust")  # the rule sets under which every run is counted
WORSE = 1.1  # of the untrained student's answer loss; a student that hardly moves ends within a hundredth of it
FORMAT = "docs/study.md"
AGAIN = "let `kd study results` write it again"

Number = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Rows(Params):
    """How many questions there were."""

    train: Count
    test: Count


class Question(Params):
    """What a study asks before it runs, and the pairs of students, as condition/student, that answer it."""

    question: str
    pairs: list[Pair] = Field(min_length=1)


class Study(Params):
    """results.json; its runs are validated one by one, as `Run`."""

    study: Name
    question: str
    questions: dict[Name, Question]
    margin: FiniteFloat
    control: str
    rows: Rows
    settings: dict[str, Any]
    teachers: dict[str, Any]
    searches: dict[str, Any]
    commands: dict[str, str]
    planned: Count  # runs; fewer are there while the study is not over
    runs: list[dict[str, Any]] = Field(min_length=1)
    summary: dict[str, Any]


class Counted(Params):
    """A run under one rule set; `right` is `pack_right`'s."""

    correct: Number
    undecided: Number
    right: str


class RuleSets(Params):
    """A run under each rule set."""

    documented: Counted
    robust: Counted


class Made(Params):
    """By what a task was done, and when (None: not known); without Git there is no `commit`."""

    commit: str | None
    changed: bool | None
    versions: dict[str, str]
    gpus: list[str]
    driver: str | None
    began: str | None
    ended: str | None


class Run(Params):
    """One student, trained with one seed (or not trained: null) and asked every test question. One that `diverged` in
    training answers none."""

    condition: Name
    student: Name
    seed: Number | None
    teacher: str | None
    prompt: str | None
    command: str
    diverged: bool
    rules: RuleSets
    answer_loss: FiniteFloat | None
    divergence: FiniteFloat | None
    mean_tokens: FiniteFloat | None
    at_limit: Number | None
    files: dict[Literal["log", "adapter"], Sha256 | None]
    made: dict[str, Made]


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a study's `runs` come to: its students by name, and of each question the pairs that are there, by
    "first - second". Shares and losses are unrounded."""
    students: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        students.setdefault(f"{run['condition']}/{run['student']}", []).append(run)
    rows = results["rows"]["test"]
    right = {rules: {name: _right(runs, rules, rows) for name, runs in students.items()} for rules in RULES}
    control = students.get(results["control"])
    bearable = WORSE * control[0]["answer_loss"] if control else None
    return {
        "students": {
            name: {
                "trained": runs[0]["seed"] is not None,
                "seeds": len(runs),
                **{rules: _accuracy(right[rules][name]) for rules in RULES},
                **{key: _spread([run[key] for run in runs]) for key in ("answer_loss", "divergence", "mean_tokens")},
                "at_limit": fmean((run["at_limit"] or 0) / rows for run in runs),
                "collapsed": sorted(run["seed"] for run in runs if _collapsed(run, bearable)),
            }
            for name, runs in students.items()
        },
        "comparisons": {
            name: {rules: _compared(question["pairs"], right[rules], results["margin"]) for rules in RULES}
            for name, question in results["questions"].items()
        },
    }


def _right(runs: Sequence[Mapping[str, Any]], rules: str, rows: int) -> Right:
    """Who was right, (seeds, questions), or of what is not trained (questions,)."""
    right = np.array([unpack_right(run["rules"][rules]["right"], rows) for run in runs])
    return right if runs[0]["seed"] is not None else right[0]


def _collapsed(run: Mapping[str, Any], bearable: float | None) -> bool:
    """Whether training made a student worse: it diverged, or its answer loss is more than is bearable."""
    return run["diverged"] or bool(run["seed"] is not None and bearable and run["answer_loss"] > bearable)


def _accuracy(right: Right) -> dict[str, Any]:
    by_seed = np.atleast_2d(right).mean(axis=1)
    return {
        "accuracy": float(right.mean()),
        "interval": list(accuracy_interval(right)),
        "lowest": float(by_seed.min()),
        "highest": float(by_seed.max()),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Over the seeds that have the value, None where none has it."""
    known = [value for value in values if value is not None]
    return {"mean": fmean(known), "lowest": min(known), "highest": max(known)} if known else None


def _compared(pairs: Sequence[Sequence[str]], right: Mapping[str, Right], margin: float) -> dict[str, Any]:
    """A question's pairs under one rule set, those that are there: one family of tests. `equivalent` are two students
    whose difference is shown to be within the margin."""
    there = [(first, second) for first, second in pairs if {first, second} <= right.keys()]
    return {
        f"{first} - {second}": {
            "difference": found.difference,
            "interval": list(found.interval),
            "p": found.p,
            "p_holm": found.p_holm,
            "detectable": found.detectable,
            "equivalent": found.excludes(margin),
            "covers_seeds": found.covers_seeds,
        }
        for (first, second), found in compare_family(there, right).items()
    }


def read_study(path: Path) -> dict[str, Any]:
    """A study's results.json, checked."""
    results = load_json(path, "a study's results")
    if not isinstance(results, dict):
        raise UserError(f"{path}: expected a mapping of keys; {FORMAT} shows what belongs there")
    check_study(results, path)
    refuse_no_numbers(results, str(path))
    refuse_half_characters(results, str(path))
    return results


def check_study(results: dict[str, Any], path: Path) -> None:
    """Refuse a study's results with a run that cannot be, or a summary that is not what its runs come to."""
    validated(Study, results, str(path), FORMAT)
    there = set()
    for number, run in enumerate(results["runs"], start=1):
        which = (run.get("condition", "?"), run.get("student", "?"), run.get("seed", "?"))
        where = "{}: run {} ({}/{}, seed {})".format(path, number, *which)
        validated(Run, run, where, FORMAT)
        _check_counts(run, results["rows"]["test"], where)
        if which in there:
            raise UserError(f"{where}: condition, student and seed of an earlier run; remove one of the two")
        there.add(which)
    if len(results["runs"]) > results["planned"]:
        raise UserError(f"{path}: planned: {results['planned']}, but there are more runs; {AGAIN}")
    wrong = next(disagreements(results["summary"], summarise(results), "summary"), None)
    if wrong:
        raise UserError(f"{path}: {wrong}: not what the runs come to; {AGAIN}")


def _check_counts(run: Mapping[str, Any], questions: int, where: str) -> None:
    """Refuse counts that cannot be, and a packed `right` that does not hold as many as are `correct`."""
    for rules, counted in run["rules"].items():
        key = f"{where}: rules.{rules}"
        try:
            right = sum(unpack_right(counted["right"], questions))
        except ValueError as error:
            raise UserError(f"{key}.right: {error}; {AGAIN}") from None
        if right != counted["correct"]:
            raise UserError(f"{key}.correct: {counted['correct']}, but `right` has {right} questions right; {AGAIN}")
        if right + counted["undecided"] > questions:
            raise UserError(f"{key}.undecided: more than the {questions - right} questions not right; {AGAIN}")
    if (run["at_limit"] or 0) > questions:
        raise UserError(f"{where}: at_limit: more than the {questions} test questions; {AGAIN}")


def disagreements(kept: Any, computed: Any, key: str) -> Iterator[str]:
    """The keys under which `kept` is not what was computed.

    Processors round exponentials and sums in the last place differently, so floats may differ by that.
    """
    if isinstance(computed, dict) and isinstance(kept, dict) and kept.keys() == computed.keys():
        for name in computed:
            yield from disagreements(kept[name], computed[name], f"{key}.{name}")
    elif isinstance(computed, list) and isinstance(kept, list) and len(kept) == len(computed):
        for number, (one, other) in enumerate(zip(kept, computed, strict=True)):
            yield from disagreements(one, other, f"{key}.{number}")
    elif isinstance(computed, float) and isinstance(kept, float | int):
        if not isclose(kept, computed, rel_tol=1e-9):
            yield key
    elif kept != computed:
        yield key
