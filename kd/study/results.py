"""The results of a study, many training runs over conditions and seeds: checked, summed up and set as tables.

All of it comes from one file, results.json, whose `runs` the study's driver writes; docs/report.md describes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from kd.config import Count, Name, Params, validated
from kd.errors import UserError
from kd.io.files import load_json
from kd.io.text import refuse_half_characters, refuse_no_numbers
from kd.scoring.significance import bootstrap_interval, holm, paired_differences, sign_flip_test, wilson_interval

Student = tuple[str, str]  # condition and experiment; its runs differ in the seed
Right = NDArray[np.bool_]  # (seeds, questions)

RULES = ("documented", "robust")  # the rule sets under which every run is counted
LOSSES = ("answer_loss", "divergence")
UNTRAINED = "untrained"
QUIRK = "quirk-"  # begins the name of a condition that is the reference's with one quirk on
BARE = (UNTRAINED, "no-distillation-matched")
PRIMED = ("teacher-kd", "ground-truth-kd", "confidence-kd")
FORMAT = "docs/report.md"
AGAIN = "let the study's driver write it again"


class Reference(Params):
    """The student that others are compared with."""

    condition: Name
    experiment: Name


class References(Params):
    """What students are compared with: the quirks with one student, a condition (first) with another (second)."""

    quirks: Reference
    conditions: dict[Name, Name]


class Rows(Params):
    """How many questions there were."""

    train: Count
    test: Count


class Study(Params):
    """results.json; its runs are validated one by one, as `Run`."""

    study: str
    question: str
    rows: Rows
    hardware: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    search: dict[str, Any]
    commands: dict[str, str]
    starting_divergence: dict[str, dict[str, FiniteFloat]]
    reference: References
    planned: Count  # runs; fewer are there while the study is not over
    diverged: list[str]  # runs that have no students
    runs: list[dict[str, Any]] = Field(min_length=1)
    summary: dict[str, Any]


Number = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Counted(Params):
    """A run under one rule set; `right` is `pack_right`'s."""

    correct: Number
    undecided: Number
    right: str


class RuleSets(Params):
    """A run under each rule set."""

    documented: Counted
    robust: Counted


class Files(Params):
    """SHA-256 of what a run left; a bare student has no adapter."""

    log: Sha256
    adapter: Sha256 | None


class Run(Params):
    """One student, trained with one seed (or not trained: null) and asked every test question."""

    condition: Name
    experiment: Name
    seed: Number | None
    teacher: str | None
    prompt: str | None
    command: str
    rules: RuleSets
    answer_loss: FiniteFloat
    divergence: FiniteFloat | None
    mean_tokens: FiniteFloat
    at_limit: Number
    files: Files


def pack_right(right: Sequence[bool]) -> str:
    """Which questions are right as hexadecimal digits, four questions each, the first the most significant bit."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()[: _digits(len(right))]


def unpack_right(digits: str, rows: int) -> list[bool]:
    """The `rows` questions of `pack_right`; a ValueError where `digits` are not what it makes of as many."""
    expected = f"expected {_digits(rows)} lower-case hexadecimal digits for {rows} questions, zero bits behind the last"
    try:
        packed = bytes.fromhex(digits + "0" * (len(digits) % 2))
    except ValueError:
        raise ValueError(expected) from None
    right = [bool(bit) for bit in np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=rows)]
    if pack_right(right) != digits:
        raise ValueError(expected)
    return right


def _digits(rows: int) -> int:
    return (rows + 3) // 4


def summarise(results: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """What a study's `runs` come to: a row for each student, the comparisons, and what each quirk changed.

    Of `results` it reads `runs`, `rows.test` and `reference`. `seed` is that of every bootstrap interval, so that one
    pair's interval does not depend on which others are there. Shares and losses are unrounded.
    """
    students: dict[Student, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        students.setdefault((run["condition"], run["experiment"]), []).append(run)
    questions = results["rows"]["test"]
    rows = [_row(student, runs, questions) for student, runs in students.items()]
    right = {rules: {student: _right(runs, rules, questions) for student, runs in students.items()} for rules in RULES}
    families = _families(list(students), results["reference"])
    comparisons = [
        {"family": family, "rules": rules, "pairs": _compared(pairs, right[rules], seed)}
        for family, pairs in families.items()
        for rules in RULES
    ]
    return {"rows": rows, "comparisons": comparisons, "quirks": _quirks(rows, comparisons)}


def _right(runs: Sequence[Mapping[str, Any]], rules: str, questions: int) -> Right:
    return np.array([unpack_right(run["rules"][rules]["right"], questions) for run in runs])


def _row(student: Student, runs: Sequence[Mapping[str, Any]], questions: int) -> dict[str, Any]:
    condition, experiment = student
    return {
        "condition": condition,
        "experiment": experiment,
        "seeds": len(runs),
        "rules": {rules: _accuracy([run["rules"][rules] for run in runs], questions) for rules in RULES},
        **{loss: _spread([run[loss] for run in runs]) for loss in LOSSES},
        "mean_tokens": fmean(run["mean_tokens"] for run in runs),
        "at_limit_share": fmean(run["at_limit"] for run in runs) / questions,
    }


def _accuracy(counted: Sequence[Mapping[str, Any]], questions: int) -> dict[str, Any]:
    correct = [one["correct"] for one in counted]
    return {
        "accuracy": fmean(correct) / questions,
        "interval": list(wilson_interval(fmean(correct), questions)),
        "lowest": min(correct) / questions,
        "highest": max(correct) / questions,
        "undecided": fmean(one["undecided"] for one in counted),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Over the seeds; None where a run does not have the value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": fmean(known), "lowest": min(known), "highest": max(known)}


def _families(students: Sequence[Student], reference: Mapping[str, Any]) -> dict[str, list[tuple[Student, Student]]]:
    """The pairs to compare, of students that are there; p-values are corrected within a family."""
    families: dict[str, list[tuple[Student, Student]]] = {}
    conditions = dict.fromkeys(where for where, _ in students if where != UNTRAINED and not where.startswith(QUIRK))
    for where in conditions:
        fine_tuning, base, tuned = ((where, name) for name in ("fine-tuning", "base-kd", "tuned-kd"))
        families[f"priming in {where}"] = [((where, name), base) for name in PRIMED]
        families[f"training in {where}"] = [(student, BARE) for student in students if student[0] == where]
        families[f"teachers in {where}"] = [(base, fine_tuning), (tuned, fine_tuning), (tuned, base)]
    for first, second in reference["conditions"].items():
        names = [name for where, name in students if where == first]
        families[f"{first} against {second}"] = [((first, name), (second, name)) for name in names]
    whole = reference["quirks"]["condition"], reference["quirks"]["experiment"]
    families["quirks"] = [(student, whole) for student in students if student[0].startswith(QUIRK)]
    there = {name: [pair for pair in pairs if set(pair) <= set(students)] for name, pairs in families.items()}
    return {name: pairs for name, pairs in there.items() if pairs}


def _compared(
    pairs: Sequence[tuple[Student, Student]], right: Mapping[Student, Right], seed: int
) -> list[dict[str, Any]]:
    """A family's comparisons under one rule set."""
    compared = [
        {"first": "/".join(first), "second": "/".join(second), **_difference(right[first], right[second], seed)}
        for first, second in pairs
    ]
    corrected = holm([pair["p"] for pair in compared])
    return [pair | {"p_holm": p_holm} for pair, p_holm in zip(compared, corrected, strict=True)]


def _difference(first: Right, second: Right, seed: int) -> dict[str, Any]:
    """The difference in mean accuracy with its bootstrap interval and its p-value."""
    differences, runs = paired_differences(first, second)
    low, high = bootstrap_interval(*np.unique(differences, return_counts=True), np.random.default_rng(seed))
    return {
        "difference": int(differences.sum()) / (runs * len(differences)),
        "interval": [low / runs, high / runs],
        "p": sign_flip_test(differences),
    }


def _quirks(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each quirk changed of the reference, beside how far apart the reference's own seeds are."""
    student = {f"{row['condition']}/{row['experiment']}": row for row in rows}
    compared = {one["rules"]: one["pairs"] for one in comparisons if one["family"] == "quirks"}
    changes = []
    for pairs in zip(*compared.values(), strict=True):
        quirk, reference = student[pairs[0]["first"]], student[pairs[0]["second"]]
        changes.append(
            {
                "quirk": pairs[0]["first"],
                "reference": pairs[0]["second"],
                "rules": {
                    rules: _accuracy_change(pair, reference["rules"][rules])
                    for rules, pair in zip(compared, pairs, strict=True)
                },
                "answer_loss": _loss_change(quirk["answer_loss"], reference["answer_loss"]),
                "divergence": _loss_change(quirk["divergence"], reference["divergence"]),
            }
        )
    return changes


def _accuracy_change(pair: Mapping[str, Any], reference: Mapping[str, float]) -> dict[str, Any]:
    return {
        "change": pair["difference"],
        "interval": pair["interval"],
        "p_holm": pair["p_holm"],
        "reference_spread": reference["highest"] - reference["lowest"],
    }


def _loss_change(quirk: Mapping[str, float] | None, reference: Mapping[str, float] | None) -> dict[str, float] | None:
    if quirk is None or reference is None:
        return None
    return {
        "change": quirk["mean"] - reference["mean"],
        "reference_spread": reference["highest"] - reference["lowest"],
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
    students = set()
    for number, run in enumerate(results["runs"], start=1):
        student = (run.get("condition", "?"), run.get("experiment", "?"), run.get("seed", "?"))
        where = "{}: run {} ({}/{}, seed {})".format(path, number, *student)
        validated(Run, run, where, FORMAT)
        _check_counts(run, results["rows"]["test"], where)
        if student in students:
            raise UserError(f"{where}: condition, experiment and seed of an earlier run; remove one of the two")
        students.add(student)
    if len(results["runs"]) + len(results["diverged"]) > results["planned"]:
        raise UserError(f"{path}: planned: {results['planned']}, but there are more runs; {AGAIN}")
    _check_reference(results, path)
    wrong = next(_disagreements(results["summary"], summarise(results), "summary"), None)
    if wrong:
        raise UserError(f"{path}: {wrong}: not what the runs come to; let the study's driver write the summary anew")


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
    if run["at_limit"] > questions:
        raise UserError(f"{where}: at_limit: more than the {questions} test questions; {AGAIN}")


def _check_reference(results: Mapping[str, Any], path: Path) -> None:
    """In a study that is over, a reference that is not there would leave out the quirks' comparisons without a word."""
    if len(results["runs"]) < results["planned"]:
        return
    reference = results["reference"]["quirks"]
    students = [(run["condition"], run["experiment"]) for run in results["runs"]]
    quirks = any(condition.startswith(QUIRK) for condition, _ in students)
    if quirks and (reference["condition"], reference["experiment"]) not in students:
        name = "{condition}/{experiment}".format(**reference)
        raise UserError(f"{path}: reference.quirks: no run is of {name}; name the student the quirks are compared with")


def _disagreements(kept: Any, computed: Any, key: str) -> Iterator[str]:
    """The keys under which `kept` is not what was computed.

    Processors round exponentials and sums in the last place differently, so floats may differ by that.
    """
    if isinstance(computed, dict) and isinstance(kept, dict) and kept.keys() == computed.keys():
        for name in computed:
            yield from _disagreements(kept[name], computed[name], f"{key}.{name}")
    elif isinstance(computed, list) and isinstance(kept, list) and len(kept) == len(computed):
        for number, (one, other) in enumerate(zip(kept, computed, strict=True)):
            yield from _disagreements(one, other, f"{key}.{number}")
    elif isinstance(computed, float) and isinstance(kept, float | int):
        if not isclose(kept, computed, rel_tol=1e-9):
            yield key
    elif kept != computed:
        yield key
