"""Bayesian search over alpha and T, as the original's: Optuna, 35 trials, judged by cross entropy after training. It
searches the learning rate as well where `search.learning_rate` gives it a range.

The original judged its trials on the test split, and so chose alpha and T with the data it reported on. Here the last
`search.eval_rows` training rows are left out of training and judge; `on_test` repeats the original's choice.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from kd.config import Config, Search
from kd.data.rows import read_examples
from kd.distill import cohort
from kd.distill.adapter import fresh_student
from kd.distill.cohort import Member
from kd.distill.lesson import Lesson, prepare_lesson
from kd.distill.memory import lowerable, shortage_told
from kd.distill.step import make_step
from kd.distill.train import descend, evaluate, run_key, step_count
from kd.errors import UserError
from kd.io.files import whole_folder, write_json
from kd.io.progress import progress
from kd.io.stopping import what_is_kept
from kd.models.load import load_tokenizer, model_folder
from kd.protocol.alignment import Match, match_examples

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
HEARTBEAT_S = 60  # a trial whose process has not been heard of for twice this is given to another


def search(config: Config, experiment: str, storage: str | None, on_test: bool) -> dict[str, Any]:
    """Run trials until the study has `search.trials` in all, and write its best values and plots; returns the former.

    Processes and hosts that name one `storage` (an SQLAlchemy address; default: an SQLite file beside the results)
    share one study; as each finishes the trial it is at, there can be a few more than asked for. A killed search goes
    on where it was.
    """
    import optuna

    folder = config.artifacts / "search" / experiment
    folder.mkdir(parents=True, exist_ok=True)
    lesson, training, judges = _split(config, experiment, on_test)
    judged = "test" if on_test else str(len(judges))
    with FileLock(folder / "study.lock"):  # processes begin together, and Optuna makes its tables unguarded
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(
                storage or f"sqlite:///{folder / STUDY}",
                heartbeat_interval=HEARTBEAT_S,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            ),
            study_name="-".join([experiment, judged, _ranges(config.search), run_key(config, experiment, __name__)]),
            load_if_exists=True,
        )

    def suggested(trial: optuna.Trial) -> Config:
        # A sampler of its own for each trial: whoever runs it, it draws the same values after the same trials.
        study.sampler = optuna.samplers.TPESampler(seed=_sampler_seed(config.seed, trial.number))
        settings = config.distill.model_copy(update=_suggested(trial, config.search))
        return config.model_copy(update={"distill": settings})

    def objective(trial: optuna.Trial) -> float:
        settings = suggested(trial).distill
        student = fresh_student(config, experiment)
        records = descend(make_step(student, lesson.head, settings), training, lesson.states, settings)
        deque(progress(records, f"trial {trial.number}", "step"), maxlen=0)
        loss = float(evaluate(student.get_base_model(), judges, None, None, settings).cross_entropy)
        if not math.isfinite(loss):
            raise optuna.TrialPruned("training diverged")
        return loss

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    enough = optuna.study.MaxTrialsCallback(config.search.trials, states=states)
    together = config.search.together
    lower = [*([f"`search.together` ({together})"] if together > 1 else []), *lowerable(config)]
    kept = f"keeps the trials that {storage or folder / STUDY} has"
    with (
        what_is_kept(folder, lambda: f"the same command {kept}"),
        shortage_told(f"search, {experiment}", lower, lambda: kept),
    ):
        while (left := config.search.trials - len(study.get_trials(states=states))) > 0:
            if together == 1:
                study.optimize(objective, callbacks=[enough])
                continue
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # a trial of a killed cohort is just not counted
            trials = [study.ask() for _ in range(min(left, together))]
            members = [Member(suggested(trial), experiment, lesson) for trial in trials]
            for trial, loss in zip(trials, _side_by_side(members, training, judges), strict=True):
                diverged = None if math.isfinite(loss) else optuna.trial.TrialState.PRUNED
                study.tell(trial, None if diverged else loss, diverged)
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        rates = "search" if config.search.learning_rate else "distill"
        raise UserError(f"{experiment}: training diverged in every trial; lower `{rates}.learning_rate`")
    with FileLock(folder / "result.lock"), whole_folder(folder / "result") as work:  # processes end together
        # Read under the lock, so that the last result is that of all trials.
        best = {**study.best_params, "cross_entropy": study.best_value, "trials": len(study.get_trials(states=states))}
        write_json(work / "best.json", best)
        _plots(study, work)
    return best


def _sampler_seed(seed: int, trial: int) -> int:
    """A seed for a trial's sampler, in the 32 bits that NumPy takes."""
    return int.from_bytes(hashlib.sha256(f"{seed}, {trial}".encode()).digest()[:4])


def _side_by_side(members: list[Member], training: list[Match], judges: list[Match]) -> Iterator[float]:
    """The cross entropy that each trial's student comes to."""
    matches = [training] * len(members)
    student, trained, step = cohort.begin(members, matches)
    steps = step_count(training, members[0].settings)
    deque(progress(cohort.descend(members, matches, step), f"{len(members)} trials", "step", steps), maxlen=0)
    for number, member in enumerate(members):
        trained.show(number)
        yield float(evaluate(student.get_base_model(), judges, None, None, member.settings).cross_entropy)


def _ranges(ranges: Search) -> str:
    """The ranges as a part of a study's name: trials of others do not count."""
    document = ranges.model_dump_json(include={"alpha", "temperature", "learning_rate"})
    return hashlib.sha256(document.encode()).hexdigest()[:8]


def _suggested(trial: optuna.Trial, ranges: Search) -> dict[str, float]:
    """The values that a trial tries, by their keys under `distill`."""
    tried = {name: trial.suggest_float(name, *getattr(ranges, name)) for name in ("alpha", "temperature")}
    if ranges.learning_rate:
        tried["learning_rate"] = trial.suggest_float("learning_rate", *ranges.learning_rate, log=True)
    return tried


def _split(config: Config, experiment: str, on_test: bool) -> tuple[Lesson, list[Match], list[Match]]:
    """The lesson, the examples to train on and those that judge."""
    lesson = prepare_lesson(config, experiment)
    if lesson.store is None:
        raise UserError(f"{experiment}: it learns from labels alone, so there is no alpha or T to search for")
    kept, rows = lesson.matches.kept, config.search.eval_rows
    if on_test:
        print(
            "kd: judging on the test split, as the original did; results on it are then no longer fair", file=sys.stderr
        )
        tests = read_examples(config.artifacts / "data" / "test.jsonl")
        tokenizer = load_tokenizer(model_folder(config.student.model))
        how = config.distill
        judges = match_examples(how.protocol, tests, tokenizer, how.max_tokens, None, how.quirks)
        return lesson, kept, judges.kept
    if rows >= len(kept):
        raise UserError(
            f"search.eval_rows: {rows} rows to judge by, but only {len(kept)} examples; leave some to train on"
        )
    return lesson, kept[:-rows], kept[-rows:]


def _plots(study: optuna.Study, folder: Path) -> None:
    """Optuna's own plots of the study, as PNG."""
    import matplotlib
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as plots

    matplotlib.use("Agg")
    warnings.simplefilter("ignore", ExperimentalWarning)  # these plots have been "experimental" since Optuna 2.2
    for name in ("plot_optimization_history", "plot_slice", "plot_contour", "plot_edf"):
        axes = getattr(plots, name)(study)
        figure = axes.flat[0].figure if hasattr(axes, "flat") else axes.figure
        figure.savefig(folder / f"{name.removeprefix('plot_')}.png", dpi=150, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
