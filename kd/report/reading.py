"""What a report is made of: the runs of every student, as their logs and adapters hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.config import Config
from kd.errors import UserError
from kd.io.files import read_json
from kd.io.table import read_table
from kd.scoring.comparison import Right
from kd.scoring.log import Answered, read_answered

CHECK = "check.json"  # what training leaves beside an adapter, and the losses
LOSS = Path("loss", "plots", "metrics", "loss.tsv")
Curve = Sequence[tuple[int, float]]  # step and loss of every update


@dataclass(frozen=True)
class Run:
    """A student that was trained with one seed (None: not trained) and asked every test question.

    `name` is that of its log and adapter, `asked` the suffix, limit and stop strings it was asked with. `curve` has the
    loss of every update, and `check` what training left beside the adapter: the original's check (mean cross entropy
    over the test rows, misaligned as in its training; None but under `published`) and the libraries' versions. Both are
    None where training left nothing.
    """

    name: str
    seed: int | None
    asked: tuple[str, int, tuple[str, ...]]
    rows: Sequence[Answered]
    curve: Curve | None = None
    check: dict[str, Any] | None = None

    @property
    def check_loss(self) -> float | None:
        """The original's check, where there is one."""
        return self.check["check_loss"] if self.check else None


def read_runs(config: Config) -> dict[str, list[Run]]:
    """The runs of each row of the table."""
    return {student: [_read(config, run) for run in runs.values()] for student, runs in config.runs.items()}


def right(runs: Sequence[Run]) -> Right:
    """Who was right, as a comparison takes it: (seeds, questions), or (questions,) of a student without a seed."""
    found = np.array([[row.right for row in run.rows] for run in runs])
    return found[0] if runs[0].seed is None else found


def _read(config: Config, name: str) -> Run:
    one, rows = config.experiments[name], read_answered(config, name)
    if one.adapter is None:
        return Run(name, None, one.asked, rows)
    again = f"run `kd train {one.adapter}` again"
    curve, check = (config.artifacts / "adapters" / one.adapter / file for file in (LOSS, CHECK))
    return Run(
        name,
        one.seed,
        one.asked,
        rows,
        _curve(curve, again) if curve.exists() else None,
        read_json(check, f"the check loss that `kd train {one.adapter}` writes") if check.exists() else None,
    )


def _curve(path: Path, again: str) -> Curve | None:
    curve = []
    for number, row in enumerate(read_table(path, ("step", "loss"), again), start=1):
        try:
            step, loss = int(row["step"]), float(row["loss"])
        except ValueError:
            step, loss = 0, math.nan
        if not math.isfinite(loss):
            raise UserError(f"{path} row {number}: no step and loss; {again}")
        curve.append((step, loss))
    return curve or None
