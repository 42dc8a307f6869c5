"""The results of a profile as a document, results.json (docs/report.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.config import Config, Experiment
from kd.errors import UserError
from kd.io.files import read_json
from kd.io.table import read_table
from kd.paper import CHECK_LOSSES, RESULTS
from kd.report.published import differences, read_prompts
from kd.report.signs import count_alike, signs
from kd.scoring.collapse import loss_ends
from kd.scoring.log import Answered, score
from kd.scoring.significance import compare_pairs, compare_with, wilson_interval

CONTROL = "no-distillation-matched"  # the untrained student, asked as the trained ones are
CHECK = "check.json"  # what training leaves beside an adapter, and the losses
LOSS = Path("loss", "plots", "metrics", "loss.tsv")
Curve = Sequence[tuple[int, float]]  # step and loss of every update


def collect(config: Config, answered: Mapping[str, Sequence[Answered]], curves: Mapping[str, Curve]) -> dict[str, Any]:
    """The document, of every row's answers and every student's loss curve, by the names in `table_rows`."""
    prompts, trained, differs = read_prompts(config), _trained(config), differences(config)
    asked = {name: config.experiments[run] for name, run in table_rows(config).items()}
    experiments = {name: _result(asked[name], rows, curves.get(name)) for name, rows in answered.items()}
    right = {name: [row.right for row in rows] for name, rows in answered.items()}
    control = CONTROL if CONTROL in experiments and not experiments[CONTROL]["trained"] else None
    against = {} if control is None else {one.first: one for one in compare_with(control, right, config.seeds[0])}
    for name, result in experiments.items():
        published = None if differs else RESULTS.get(asked[name].student)
        result["against_control"] = (
            _against(asked[name], asked[CONTROL], asdict(against[name])) if name in against else None
        )
        result["published_accuracy"] = published.accuracy / 100 if published else None
    return {
        "profile": config.profile,
        "protocol": config.distill.protocol,
        "seeds": config.seeds,
        "dataset": config.dataset.model_dump(),
        "student": config.student.model_dump(),
        "teacher": config.teacher.model_dump(),
        "differs_from_paper": differs,
        "versions": {  # of what made the results, wherever that was; not of the report
            "training": {name: check["versions"] for name, check in trained.items()},
            "teacher": {prompt: found["versions"] for prompt, found in prompts.items()},
        },
        "prompts": prompts,
        "control": control,
        "experiments": experiments,
        "comparisons": [asdict(pair) for pair in compare_pairs(right, config.seeds[0])],
        "check_losses": {
            name: {
                "check_loss": check["check_loss"],
                "published": None if differs else CHECK_LOSSES.get(asked[name].student),
            }
            for name, check in trained.items()
            if check["check_loss"] is not None
        },
    }


def table_rows(config: Config) -> dict[str, str]:
    """The rows of the table and the run that each shows: a student that has one run by its own name, else each run."""
    return {student if len(runs) == 1 else run: run for student, runs in config.runs.items() for run in runs.values()}


def read_curves(config: Config) -> dict[str, Curve]:
    """The loss curve of each row that has one."""
    paths = {name: config.artifacts / "adapters" / run / LOSS for name, run in table_rows(config).items()}
    curves = {name: _curve(path, path.parents[3].name) for name, path in paths.items() if path.exists()}
    return {name: curve for name, curve in curves.items() if curve}


def _curve(path: Path, run: str) -> Curve:
    curve = []
    for number, row in enumerate(read_table(path, ("step", "loss"), f"run `kd train {run}` again"), start=1):
        try:
            step, loss = int(row["step"]), float(row["loss"])
        except ValueError:
            step, loss = 0, math.nan
        if not math.isfinite(loss):
            raise UserError(f"{path} row {number}: no step and loss; run `kd train {run}` again")
        curve.append((step, loss))
    return curve


def _result(one: Experiment, rows: Sequence[Answered], curve: Curve | None) -> dict[str, Any]:
    """What one experiment came to, by itself."""
    scored, trained = score(rows), one.seed is not None
    same, empty = count_alike([row.response for row in rows])
    result: dict[str, Any] = {
        "trained": trained,
        "correct": scored.correct,
        "rows": len(rows),
        "accuracy": scored.correct / len(rows),
        "interval": wilson_interval(scored.correct, len(rows)),
        "by_hand": scored.by_hand,
        "undecided": scored.undecided,
        "loss": loss_ends([loss for _, loss in curve]) if curve else None,
        "at_limit": sum(row.reached_limit for row in rows),
        "same": same,
        "empty": empty,
    }
    return result | {"collapsed": (signs(result) or None) if trained else None}


def _against(one: Experiment, control: Experiment, comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison with the control, and whether both were asked in the same way."""
    return {
        "difference": comparison["difference"],
        "interval": comparison["interval"],
        "only_this": comparison["only_first"],
        "only_control": comparison["only_second"],
        "p": comparison["p"],
        "p_holm": comparison["p_holm"],
        "asked_alike": one.asked == control.asked,
    }


def _trained(config: Config) -> dict[str, dict[str, Any]]:
    """What training left beside the adapter of each row, where that is there: the original's check (mean cross entropy
    over the test rows, misaligned as in its training; None but under `published`), and the libraries' versions."""
    return {
        name: read_json(path, f"the check loss that `kd train {run}` writes")
        for name, run in table_rows(config).items()
        if (path := config.artifacts / "adapters" / run / CHECK).exists()
    }
