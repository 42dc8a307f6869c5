"""Bayesian search over alpha and T, as the original's: Optuna, 35 trials, judged by cross entropy after training. It
searches the learning rate as well where `search.learning_rate` gives it a range.

The original judged its trials on the test split, and so chose alpha and T with the data it reported on. Here the last
`search.eval_rows` training rows are left out of training and judge; `on_test` repeats the original's choice.

Values that suit one seed can make another collapse. So a trial trains a student for each of `search.seeds`, over all
epochs, and counts as its worst one does: a mean would let two good students hide one that is lost, and whoever uses the
values trains few students. A trial with a student that diverges, whose training loss rises, or that ends clearly worse
than the untrained one is pruned at once and cannot be recommended.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from ruamel.yaml import YAML

from kd.config import Config, Distill, Search, run_name
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
from kd.scoring.collapse import ended_worse, loss_ends

if TYPE_CHECKING:
    import optuna

STUDY = "study.db"
HEARTBEAT_S = 60  # a trial whose process has not been heard of for twice this is given to another
UNTRAINED, SEEDS, COLLAPSED = "untrained", "seeds", "collapsed"  # what Optuna keeps of a study, and of a trial
DIVERGED = "its training diverged"


@dataclass(frozen=True)
class Exam:
    """What a search's students learn from, the examples they are trained on, and those that judge them."""

    lesson: Lesson
    training: list[Match]
    judges: list[Match]

    def judge(self, student: Any, settings: Distill) -> list[float]:
        """A student's cross entropy of each example that judges."""
        model = student.get_base_model()
        return [float(evaluate(model, [judge], None, None, settings).cross_entropy) for judge in self.judges]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial's student: its cross entropy, or why it is lost."""

    seed: int
    cross_entropy: float = math.nan
    lost: str = ""


def search(config: Config, student: str, storage: str | None, on_test: bool) -> dict[str, Any]:
    """Run trials until the study has `search.trials` in all, and write its best values and plots; returns the former.

    Processes and hosts that name one `storage` (an SQLAlchemy address; default: an SQLite file beside the results)
    share one study; as each finishes the trial it is at, there can be a few more than asked for. A killed search goes
    on where it was.
    """
    import optuna

    config = config.model_copy(update={"seeds": config.search.seeds})
    first = run_name(student, config.seeds[0])
    folder = config.artifacts / "search" / student
    folder.mkdir(parents=True, exist_ok=True)
    exam = _exam(config, student, on_test)
    judged = "test" if on_test else str(len(exam.judges))
    with FileLock(folder / "study.lock"):  # processes begin together, and Optuna makes its tables unguarded
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(
                storage or f"sqlite:///{folder / STUDY}",
                heartbeat_interval=HEARTBEAT_S,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            ),
            pruner=optuna.pruners.MedianPruner(),
            study_name="-".join([student, judged, _meaning(config.search), run_key(config, first, __name__)]),
            load_if_exists=True,
        )
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    together = config.search.together
    lower = [*([f"`search.together` ({together})"] if together > 1 else []), *lowerable(config)]
    kept = f"keeps the trials that {storage or folder / STUDY} has"
    with (
        what_is_kept(folder, lambda: f"the same command {kept}"),
        shortage_told(f"search, {student}", lower, lambda: kept),
    ):
        if UNTRAINED not in study.user_attrs:
            study.set_user_attr(UNTRAINED, exam.judge(fresh_student(config, first), config.distill))
        _run_trials(study, config, student, exam, states)
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        raise UserError(_all_lost(study, config, student))
    with FileLock(folder / "result.lock"), whole_folder(folder / "result") as work:  # processes end together
        # Read under the lock, so that the last result is that of all trials.
        best = _best(study, config, len(exam.judges))
        write_json(work / "best.json", best)
        _plots(study, work)
    if best["cross_entropy"] >= best["untrained"]:
        print(
            f"kd: {student}: even these values leave the worst seed no better than the untrained student; train for "
            "more epochs, on more rows or at another learning rate",
            file=sys.stderr,
        )
    return best


def recommendation(best: dict[str, Any]) -> str:
    """What `search` found, as YAML to be pasted into a params file: the whole section `distill`, behind comments."""
    snippet = StringIO()
    YAML().dump({"distill": best["distill"]}, snippet)
    found = ", ".join(f"{name} {best[name]:.4g}" for name in ("alpha", "temperature", "learning_rate") if name in best)
    spread = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in best["spread"].items())
    seeds = ", ".join(f"seed {seed} {value:.4f}" for seed, value in best["seeds"].items())
    worst = f"{best['cross_entropy']:.4f} at the worst seed, {best['untrained']:.4f} untrained"
    return f"""# found: {found}
# cross entropy of {best["judged_rows"]} rows: {worst}
# by seed: {seeds}
# spread: {spread}
# trials: {best["trials"]}, {best["pruned"]} of them pruned
{snippet.getvalue()}"""


def _run_trials(study: optuna.Study, config: Config, student: str, exam: Exam, states: Any) -> None:
    """Run trials, one after the other or several as a cohort, until so many as asked for are in one of `states`."""
    import optuna

    untrained = study.user_attrs[UNTRAINED]

    def suggested(trial: optuna.Trial) -> Config:
        # A sampler of its own for each trial: whoever runs it, it draws the same values after the same trials.
        study.sampler = optuna.samplers.TPESampler(seed=_sampler_seed(config.seeds[0], trial.number))
        settings = config.distill.model_copy(update=_suggested(trial, config.search))
        return config.model_copy(update={"distill": _shortened(settings, exam)})

    def objective(trial: optuna.Trial) -> float:
        outcomes = _one_by_one(suggested(trial), student, exam, untrained, trial.number)
        return _settled(trial, outcomes, len(config.search.seeds))

    enough = optuna.study.MaxTrialsCallback(config.search.trials, states=states)
    while (left := config.search.trials - len(study.get_trials(states=states))) > 0:
        if config.search.together == 1:
            study.optimize(objective, callbacks=[enough])
            continue
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # a trial of a killed cohort is just not counted
        trials = [study.ask() for _ in range(min(left, config.search.together))]
        found = _side_by_side([suggested(trial) for trial in trials], student, exam, untrained)
        for trial, outcomes in zip(trials, found, strict=True):
            try:
                study.tell(trial, _settled(trial, outcomes, len(config.search.seeds)))
            except optuna.TrialPruned as pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                # As `optimize` says it.
                optuna.logging.get_logger("optuna.study").info(f"Trial {trial.number} pruned. {pruned}")


def _settled(trial: optuna.Trial, outcomes: Iterable[Outcome], seeds: int) -> float:
    """The cross entropy of a trial's worst student; TrialPruned at the first that is lost, and where those so far are
    worse than the median trial's."""
    import optuna

    judged: dict[int, float] = {}
    for outcome in outcomes:
        if outcome.lost:
            trial.set_user_attr(COLLAPSED, outcome.lost)
            raise optuna.TrialPruned(f"Seed {outcome.seed}: {outcome.lost}")
        judged[outcome.seed] = outcome.cross_entropy
        trial.report(max(judged.values()), len(judged))
        if len(judged) < seeds and trial.should_prune():
            raise optuna.TrialPruned(
                f"Seed {outcome.seed}: its cross entropy, {outcome.cross_entropy:.4f}, is above the median trial's"
            )
    trial.set_user_attr(SEEDS, {str(seed): loss for seed, loss in judged.items()})
    return max(judged.values())


def _one_by_one(config: Config, student: str, exam: Exam, untrained: list[float], number: int) -> Iterator[Outcome]:
    """A trial's students, each trained when it is asked for."""
    steps = step_count(exam.training, config.distill)
    for seed in config.seeds:
        tuned = fresh_student(config, run_name(student, seed))
        step = make_step(tuned, exam.lesson.head, config.distill)
        records = descend(step, exam.training, exam.lesson.states, config.distill)
        losses: list[float] = []
        for record in progress(records, f"trial {number}, seed {seed}", "step", steps):
            losses.append(record.loss)
            if lost := _lost(losses, steps // config.distill.epochs):
                yield Outcome(seed, lost=lost)
                return
        yield _judged(seed, exam.judge(tuned, config.distill), untrained)


def _side_by_side(configs: list[Config], student: str, exam: Exam, untrained: list[float]) -> Iterator[list[Outcome]]:
    """The students of several trials, trained as one cohort until each trial has lost one."""
    runs = [(trial, seed) for trial in range(len(configs)) for seed in configs[trial].seeds]
    members = [Member(configs[trial], run_name(student, seed), exam.lesson) for trial, seed in runs]
    matches = [exam.training] * len(members)
    tuned, trained, step = cohort.begin(members, matches)
    steps = step_count(exam.training, configs[0].distill)
    curves: list[list[float]] = [[] for _ in members]
    lost: dict[int, dict[int, str]] = {trial: {} for trial in range(len(configs))}  # why, by trial and seed
    updates = cohort.descend_apart(members, matches, step)
    for _, (totals, *_) in progress(updates, f"{len(configs)} trials", "step", steps):
        for (trial, seed), curve, loss in zip(runs, curves, totals, strict=True):
            curve.append(loss)
            if why := _lost(curve, steps // configs[trial].distill.epochs):
                lost[trial].setdefault(seed, why)
        if all(lost.values()):
            break
    for trial, config in enumerate(configs):
        if lost[trial]:
            yield [Outcome(seed, lost=why) for seed, why in lost[trial].items()]
            continue
        outcomes = []
        for member, (of, seed) in enumerate(runs):
            if of == trial:
                trained.show(member)
                outcomes.append(_judged(seed, exam.judge(tuned, config.distill), untrained))
        yield outcomes


def _lost(losses: Sequence[float], epoch: int) -> str | None:
    """Why a student with these losses so far is lost, if it is; asked after each update, and looked at closely after an
    `epoch` of them."""
    if not math.isfinite(losses[-1]):
        return f"{DIVERGED}, its loss was {losses[-1]} at update {len(losses)}"
    if len(losses) % epoch or not (ends := loss_ends(losses))["rose"]:
        return None
    return f"its training loss rose from {ends['first']:.4g} to {ends['last']:.4g} in {len(losses)} updates"


def _judged(seed: int, losses: list[float], untrained: list[float]) -> Outcome:
    """What became of a student that was trained to the end, by its cross entropies and the untrained student's."""
    if worse := ended_worse(untrained, losses):
        return Outcome(seed, lost=f"its cross entropy went from {worse[0]:.4g}, untrained, to {worse[1]:.4g}")
    return Outcome(seed, fmean(losses))


def _best(study: optuna.Study, config: Config, judged_rows: int) -> dict[str, Any]:
    """best.json: the values recommended, what they came to, and the whole section `distill` with them.

    Not simply the best trial: of those that its own spread over seeds does not tell from it, the one with the lowest
    learning rate. The best of many lies close to where students collapse, and owes something to luck.
    """
    import optuna

    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    pruned = study.get_trials(states=(optuna.trial.TrialState.PRUNED,))
    least = min(complete, key=_worst)
    near = [trial for trial in complete if _worst(trial) <= _worst(least) + _deviation(least)]
    chosen = min(near, key=lambda trial: (trial.params.get("learning_rate", 0.0), _worst(trial)))
    seeds = chosen.user_attrs[SEEDS]
    spread = {"lowest": min(seeds.values()), "mean": mean(seeds.values()), "highest": max(seeds.values())}
    return {
        **chosen.params,
        "cross_entropy": _worst(chosen),
        "seeds": seeds,
        "spread": spread | {"standard_deviation": _deviation(chosen)},
        "untrained": fmean(study.user_attrs[UNTRAINED]),
        "judged_rows": judged_rows,
        "trials": len(complete) + len(pruned),
        "pruned": len(pruned),
        "distill": config.distill.model_copy(update=chosen.params).model_dump(mode="json"),
    }


def _worst(trial: optuna.trial.FrozenTrial) -> float:
    """The cross entropy of a complete trial's worst student, which is the trial's value."""
    worst: float = max(trial.user_attrs[SEEDS].values())
    return worst


def _deviation(trial: optuna.trial.FrozenTrial) -> float:
    """The standard deviation of a trial's cross entropies over its seeds; 0 of one seed."""
    losses = list(trial.user_attrs[SEEDS].values())
    return stdev(losses) if len(losses) > 1 else 0.0


def _all_lost(study: optuna.Study, config: Config, student: str) -> str:
    """What a person is told whose trials were all pruned."""
    trials = study.get_trials(deepcopy=False)
    why = [trial.user_attrs[COLLAPSED] for trial in trials if COLLAPSED in trial.user_attrs]
    rates = config.search.learning_rate
    key = f"`search.learning_rate` ({rates})" if rates else f"`distill.learning_rate` ({config.distill.learning_rate})"
    what = "diverged" if all(one.startswith(DIVERGED) for one in why) else "diverged or collapsed"
    return f"{student}: training {what} in every trial; lower {key}; of the last trial's student: {why[-1]}"


def _sampler_seed(seed: int, trial: int) -> int:
    """A seed for a trial's sampler, in the 32 bits that NumPy takes."""
    return int.from_bytes(hashlib.sha256(f"{seed}, {trial}".encode()).digest()[:4])


def _meaning(how: Search) -> str:
    """The ranges and seeds as a part of a study's name: trials of others do not count."""
    document = how.model_dump_json(include={"alpha", "temperature", "learning_rate", "seeds"})
    return hashlib.sha256(document.encode()).hexdigest()[:8]


def _suggested(trial: optuna.Trial, ranges: Search) -> dict[str, float]:
    """The values that a trial tries, by their keys under `distill`."""
    tried = {name: trial.suggest_float(name, *getattr(ranges, name)) for name in ("alpha", "temperature")}
    if ranges.learning_rate:
        tried["learning_rate"] = trial.suggest_float("learning_rate", *ranges.learning_rate, log=True)
    return tried


def _shortened(settings: Distill, exam: Exam) -> Distill:
    """The same schedule over the rows that are left to train on: where the run is shorter, the cosine's period is."""
    whole = step_count(exam.lesson.matches.kept, settings)
    steps = round(settings.cosine_steps * step_count(exam.training, settings) / whole)
    return settings.model_copy(update={"cosine_steps": max(1, steps)})


def _exam(config: Config, student: str, on_test: bool) -> Exam:
    """The lesson, the examples to train on and those that judge."""
    lesson = prepare_lesson(config, config.students[student])
    if lesson.store is None:
        raise UserError(f"{student}: it learns from labels alone, so there is no alpha or T to search for")
    kept, rows = lesson.matches.kept, config.search.eval_rows
    if on_test:
        print(
            "kd: judging on the test split, as the original did; results on it are then no longer fair", file=sys.stderr
        )
        tests = read_examples(config.artifacts / "data" / "test.jsonl")
        tokenizer = load_tokenizer(model_folder(config.student.model))
        how = config.distill
        judges = match_examples(how.protocol, tests, tokenizer, how.max_tokens, None, how.quirks)
        return Exam(lesson, kept, judges.kept)
    if rows >= len(kept):
        raise UserError(
            f"search.eval_rows: {rows} rows to judge by, but only {len(kept)} examples; leave some to train on"
        )
    return Exam(lesson, kept[:-rows], kept[-rows:])


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
