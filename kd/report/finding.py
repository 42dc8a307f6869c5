"""What a profile's results show, in a sentence, and whether the paper's figures may stand beside them, in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kd.report.signs import named
from kd.scoring.comparison import LEVEL, MARGIN

NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


def finding(results: Mapping[str, Any]) -> str:
    """What the accuracies show, in one sentence."""
    trained = {name: one for name, one in results["experiments"].items() if one["trained"]}
    if not trained:
        return "This profile has no trained student, so there is nothing to compare."
    shown = _against_control(trained) if results["control"] else _without_control(trained)
    collapsed = named(trained)
    return f"{shown}{f'; {listed(collapsed)} collapsed' if collapsed else ''}."


def comparability(results: Mapping[str, Any]) -> str:
    """Whether these results may be compared with the paper's, and why not, in one sentence."""
    differs = results["differs_from_paper"]
    if not differs:
        return "This profile reruns the paper, whose figures stand beside its own."
    these = "These are the miniature's problems: nothing here" if _is_miniature(results) else "Nothing here"
    return f"{these} can be compared with the paper ({listed(differs)})."


def is_difference(against: Mapping[str, Any]) -> bool:
    """Whether a row's difference from the control is shown to be one, after Holm's correction."""
    return bool(against["p_holm"] < LEVEL)


def points(share: float) -> str:
    """A difference in accuracy, in words."""
    return f"{round(100 * share, 1):g} points"


def detectable(comparison: Mapping[str, Any]) -> str:
    """The smallest difference that a comparison would have shown; none where not even the largest."""
    return points(comparison["detectable"]) if comparison["detectable"] <= 1 else "none"


def p_value(p: float, least: float = 0.0001) -> str:
    """A p-value as text; a tiny one by what it is below."""
    return f"p < {least}" if p < least else f"p {p:.2g}"


def listed(names: Sequence[str]) -> str:
    """Names as one writes them: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _is_miniature(results: Mapping[str, Any]) -> bool:
    return bool(results["dataset"]["source"] == "miniature")


def _against_control(trained: Mapping[str, Mapping[str, Any]]) -> str:
    against = {name: one["against_control"] for name, one in trained.items()}
    alike = all(one["asked_alike"] for one in against.values())
    control = "than the untrained one asked the same way" if alike else "than the untrained one"
    changed = {name: one for name, one in against.items() if is_difference(one)}
    parts: list[str] = []
    for word, sign in (("more", 1), ("fewer", -1)):
        group = {name: one for name, one in changed.items() if sign * one["difference"] > 0}
        if group:
            what = f"{word} test questions right {control}" if not parts else word
            parts.append(f"{_who(group, trained, first=not parts)} {what}{_largest(group)}")
    if not parts:
        return _no_difference(against, control.removeprefix("than "))
    rest = {name: one for name, one in against.items() if name not in changed}
    if rest:
        others = f"the other{f' {_number(len(rest))}' if len(rest) > 1 else ''}"
        parts.append(f"for {others} no difference is shown ({_could_have(rest)})")
    return "; ".join(parts)


def _who(group: Mapping[str, Any], trained: Mapping[str, Any], *, first: bool) -> str:
    """The subject of a sentence about some of the trained students, with its verb."""
    verb = "answers" if len(group) == 1 else "answer"
    name = f", {next(iter(group))}," if len(group) == 1 else ""
    if not first:
        return f"{_number(len(group))}{name} {verb}"
    if len(trained) == 1:
        return f"The trained student{name} {verb}"
    if len(group) == len(trained):
        return f"{'Both' if len(group) == 2 else f'All {_number(len(group))}'} trained students {verb}"
    return f"{_number(len(group)).capitalize()} of the {_number(len(trained))} trained students{name} {verb}"


def _largest(group: Mapping[str, Mapping[str, Any]]) -> str:
    """The largest difference of a group, all of whose differences have one sign."""
    name, one = max(group.items(), key=lambda item: abs(item[1]["difference"]))
    points, p = f"{100 * abs(one['difference']):.0f} points", p_value(one["p_holm"], 0.001)
    if len(group) == 1:
        return f" ({points}, {p})"
    return f"; the largest {'gain' if one['difference'] > 0 else 'drop'} is that of {name}, {points} ({p})"


def _no_difference(against: Mapping[str, Mapping[str, Any]], control: str) -> str:
    alone = len(against) == 1
    who = "The trained student is not" if alone else f"None of the {_number(len(against))} trained students is"
    name, one = max(against.items(), key=lambda item: abs(item[1]["difference"]))
    size = f"({100 * one['difference']:+.1f} points, {p_value(one['p_holm'])})"
    largest = f" {size}" if alone else f"; the largest difference is that of {name} {size}"
    shown = f"{who} shown to differ from {control}{largest if one['difference'] else ', which has as many right'}"
    return f"{shown}; {_could_have(against)}"


def _could_have(against: Mapping[str, Mapping[str, Any]]) -> str:
    """What differences that are not shown may still be: whether all that matter are excluded, or else the smallest that
    each of these comparisons would have shown."""
    if all(one["excluded"] for one in against.values()):
        return f"a difference of {points(MARGIN)} or more is excluded"
    least = max(one["detectable"] for one in against.values())
    if least > 1:
        return "with so few runs and questions none could have been"
    return f"one of {100 * least:.0f} points would have been, with 80 % power"


def _without_control(trained: Mapping[str, Mapping[str, Any]]) -> str:
    name, one = max(trained.items(), key=lambda item: float(item[1]["accuracy"]))
    who = f"The trained student, {name}," if len(trained) == 1 else f"Most right of the trained students has {name}:"
    has = " answers" if len(trained) == 1 else ""
    correct = f"{fmean(run['correct'] for run in one['runs']):.4g} of {one['rows']}"
    mean = f", on average over {len(one['runs'])} seeds" if len(one["runs"]) > 1 else ""
    return (
        f"{who}{has} {correct} test questions{' right' if has else ''}{mean}; no untrained student "
        "asked the same way stands beside, so the table does not say what training changed"
    )


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
