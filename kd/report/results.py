"""The results of a profile as a document, results.json (docs/report.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean
from typing import Any

from kd.config import Config
from kd.paper import CHECK_LOSSES, RESULTS
from kd.report.published import differences, read_prompts
from kd.report.reading import Run, right
from kd.report.signs import count_alike, signs
from kd.scoring.collapse import loss_ends
from kd.scoring.comparison import MARGIN, Difference, accuracy_interval, as_rows, compare_family
from kd.scoring.log import score

CONTROL = "no-distillation-matched"  # the untrained student, asked as the trained ones are


def collect(config: Config, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The document, of every student's runs."""
    prompts, differs = read_prompts(config), differences(config)
    checks = {run.name: run.check for student in runs.values() for run in student if run.check}
    found = {name: right(student) for name, student in runs.items()}
    control = CONTROL if CONTROL in runs and runs[CONTROL][0].seed is None else None
    others = [(name, control) for name in runs if name != control] if control else []
    against = {name: one for (name, _), one in compare_family(others, found).items()}
    return {
        "profile": config.profile,
        "protocol": config.distill.protocol,
        "seeds": sorted({run.seed for student in runs.values() for run in student if run.seed is not None}),
        "dataset": config.dataset.model_dump(),
        "student": config.student.model_dump(),
        "teacher": config.teacher.model_dump(),
        "differs_from_paper": differs,
        "versions": {  # of what made the results, wherever that was; not of the report
            "training": {name: check["versions"] for name, check in checks.items()},
            "teacher": {prompt: one["versions"] for prompt, one in prompts.items()},
        },
        "prompts": prompts,
        "control": control,
        "margin": MARGIN,
        "experiments": {
            name: _result(student)
            | {
                "against_control": _against(student[0], runs[CONTROL][0], against[name]) if name in against else None,
                "published_accuracy": RESULTS[name].accuracy / 100 if not differs and name in RESULTS else None,
            }
            for name, student in runs.items()
        },
        "comparisons": as_rows(compare_family(combinations(runs, 2), found)),
        "check_losses": {
            name: {"check_loss": fmean(losses), "published": None if differs else CHECK_LOSSES.get(name)}
            for name, student in runs.items()
            if (losses := [run.check_loss for run in student if run.check_loss is not None])
        },
    }


def _result(runs: Sequence[Run]) -> dict[str, Any]:
    """What one student came to, by itself: the mean of its runs, and each of them."""
    found = [_run(run) for run in runs]
    accuracies = [one["accuracy"] for one in found]
    trained = runs[0].seed is not None
    return {
        "trained": trained,
        "rows": len(runs[0].rows),
        "accuracy": fmean(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "interval": accuracy_interval(right(runs)),
        "collapsed": [one["seed"] for one in found if one["signs"]] if trained else [],
        "runs": found,
    }


def _run(run: Run) -> dict[str, Any]:
    """What one run came to."""
    scored = score(run.rows)
    same, empty = count_alike([row.response for row in run.rows])
    found: dict[str, Any] = {
        "name": run.name,
        "seed": run.seed,
        "rows": len(run.rows),
        "correct": scored.correct,
        "accuracy": scored.correct / len(run.rows),
        "by_hand": scored.by_hand,
        "undecided": scored.undecided,
        "loss": loss_ends([loss for _, loss in run.curve]) if run.curve else None,
        "at_limit": sum(row.reached_limit for row in run.rows),
        "same": same,
        "empty": empty,
    }
    return found | {"signs": signs(found)}


def _against(run: Run, control: Run, one: Difference) -> dict[str, Any]:
    """A comparison with the control, and whether both were asked in the same way."""
    return asdict(one) | {"excluded": one.excludes(MARGIN), "asked_alike": run.asked == control.asked}
