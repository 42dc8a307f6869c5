"""The published assessment logs, scored again: counts, rules, hand decisions, statistics, and what contradicts what.

Source: assessment/logs/*.csv and assessment/assess.ipynb of the paper's repository, at `logs.COMMIT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd.audit.logs import Log, rows_right
from kd.data.number import equal
from kd.paper import RESULTS
from kd.protocol.order import published_teacher_order
from kd.scoring.review import NO_ANSWER
from kd.scoring.rules.documented import RULES, answer_is
from kd.scoring.rules.rule import Extraction
from kd.scoring.significance import wilson_interval

TRAIN_ROWS = 2638


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
            rules: sum(equal(found[i].answer or NO_ANSWER, log.decided[i]) for i in left)
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
            rules[found.rule]["correct"] += equal(found.answer, true)
    return rules


def _rule_set(extractions: list[Extraction], truth: list[str]) -> dict[str, Any]:
    correct = sum(equal(found.answer, true) for found, true in zip(extractions, truth, strict=True))
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
    counts = ", ".join(f"{name} {share(rule)}" for name, rule in students.items())
    return f"Rule 2 (first line) is right in: {counts}."


def _format(logs: Mapping[str, Log], experiments: dict[str, Any]) -> str:
    students = {name: e["rules"] for name, e in experiments.items() if name != "no-distillation"}

    def shares(rule: str) -> str:
        counts = sorted((rules["boxed"]["rows"], name, rules[rule]) for name, rules in students.items())
        return ", ".join(f"{name} {share(counted)}" for _, name, counted in counts)

    limit = min(sum(log.reached_limit) / len(log.tokens) for log in logs.values())
    return (
        f"Rule 1 (a box) is right in: {shares('boxed')}. Rule 4 (last number) is right in: {shares('last-number')}. "
        f"At least {limit:.1%} of each log's responses run into the token limit."
    )


def share(rule: dict[str, int]) -> str:
    """Rows right of rows settled, and how much that is."""
    share = f" ({rule['correct'] / rule['rows']:.0%})" if rule["rows"] else ""
    return f"{rule['correct']} of {rule['rows']}{share}"
