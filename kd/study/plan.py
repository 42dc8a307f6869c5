"""What the study runs: its conditions as params files, and its work as tasks, each a few commands in order."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from ruamel.yaml import YAML

from kd.config import Config, Params, Seed, choose, load_config, read_mapping, validated
from kd.errors import UserError
from kd.io.files import read_json, whole_file, write_text
from kd.study.results import References

CONDITIONS = "conditions.yaml"
PARAMS = Path("params")
TUNED = "tuned"  # the teacher that has to be made first
TUNED_TEACHER = Path("artifacts/tuned-teacher")
TOGETHER = "a study's conditions.yaml and params.yaml lie in one folder"
ALL_ROWS = 7473  # of GSM8K's training split
ENDED = "cohort.json"  # which `train_cohort` leaves


class Teacher(Params):
    """A teacher: the students it has, the one whose values are searched, and what it changes in params."""

    adapters: list[str]
    search: str
    params: dict[str, Any] = Field(default={})


class Untrained(Params):
    """Models that are only assessed."""

    experiments: list[str]
    params: dict[str, Any] = Field(default={})


class Condition(Params):
    """A way to train: what it changes in params, which keys under `distill` it takes from `kd search`, which of the
    teachers' students it trains (None: all), and with which other conditions (None: with none)."""

    params: dict[str, Any] = Field(default={})
    searched: list[Literal["alpha", "temperature", "learning_rate"]] = Field(default=[])
    adapters: list[str] | None = None
    cohort: str | None = None


class TunedTeacher(Params):
    """How the tuned teacher is made."""

    rows: list[int]
    epochs: int
    batch_rows: int
    learning_rate: float
    max_tokens: int


class Study(Params):
    """conditions.yaml."""

    study: str
    question: str
    seeds: list[Seed] = Field(min_length=1)
    search: dict[str, Any]
    teachers: dict[str, Teacher]
    untrained: dict[str, Untrained]
    conditions: dict[str, Condition]
    reference: References
    tuned_teacher: TunedTeacher | None = None


@dataclass(frozen=True)
class Arm:
    """Runs that share one params file; `seed` is None where nothing is trained."""

    condition: str
    teacher: str
    seed: int | None

    @property
    def profile(self) -> str:
        """The arm's profile, whose results lie under artifacts/<profile>/."""
        return f"{self.condition}-{self.teacher}" + ("" if self.seed is None else f"-s{self.seed}")

    @property
    def params(self) -> Path:
        """Its params file."""
        return PARAMS / f"{self.profile}.yaml"

    def at(self, *parts: str) -> Path:
        """A path among its results."""
        return Path("artifacts", self.profile, *parts)


DATA = Arm("data", "self", None)  # whose rows all others share


@dataclass(frozen=True)
class Run:
    """One student of an arm, assessed and measured."""

    arm: Arm
    experiment: str
    cohort: str | None  # the task that trains it beside others, None where nothing is trained

    @property
    def name(self) -> str:
        """Its name as a task, and as a student of its cohort."""
        return f"{self.arm.profile}/{self.experiment}"

    @property
    def record(self) -> Path:
        """What `results.json` takes from it."""
        return self.arm.at("runs", f"{self.experiment}.json")

    @property
    def commands(self) -> list[list[str]]:
        """The `kd` commands that assess and measure it."""
        return [[stage, self.experiment, "--params", str(self.arm.params)] for stage in ("assess", "measure")]


@dataclass(frozen=True)
class Step:
    """A command of a task, done when `made` is there: `tune`, `cohort`, `record` or, without the `kd`, one of `kd`."""

    command: list[str]
    made: Path


@dataclass(frozen=True)
class Task:
    """Steps in order, in a process of their own; `arm` is the one whose params file they read. `load` is how many
    students it keeps a GPU busy with."""

    name: str
    steps: list[Step]
    arm: Arm
    needs: list[str] = field(default_factory=list)
    load: int = 1

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(step.made.exists() for step in self.steps)


class Plan:
    """The study over one folder of GSM8K (None: from the Hub). All paths are relative to the working folder."""

    def __init__(self, conditions: Path, gsm8k: Path | None) -> None:
        self.study = validated(Study, read_mapping(conditions, TOGETHER), str(conditions), "conditions.yaml")
        self.conditions = conditions
        self._base = read_mapping(conditions.with_name("params.yaml"), TOGETHER)
        self.gsm8k = gsm8k
        self._check_names()

    @property
    def name(self) -> str:
        """The study's folder, as a command in the checkout names it."""
        return f"studies/{self.conditions.parent.name}"

    def runs(self) -> list[Run]:
        """Every run, in the order of the tables."""
        bare = [
            Run(Arm("untrained", name, None), experiment, None)
            for name, untrained in self.study.untrained.items()
            for experiment in untrained.experiments
        ]
        return bare + [
            Run(Arm(name, teacher, seed), adapter, f"cohort-{condition.cohort or name}-{teacher}")
            for name, condition in self.study.conditions.items()
            for teacher in self.study.teachers
            for adapter in self._adapters(name, teacher)
            for seed in self.study.seeds
        ]

    def tasks(self) -> list[Task]:
        """All work, what others wait for first."""
        runs = map(self._run_task, self.runs())
        return [*self._preparations(), *self._captures(), *self._searches(), *self._cohorts(), *runs]

    def missing(self) -> list[Task]:
        """Of the tasks, those of runs without a record, and what these need that is not there: a teacher or an adapter
        whose runs are over may be gone."""
        tasks = {task.name: task for task in self.tasks()}
        wanted: set[str] = set()
        names = [run.name for run in self.runs() if not self.diverged(run)]
        while names:
            task = tasks[names.pop()]
            if task.name not in wanted and not task.done:
                wanted.add(task.name)
                names += task.needs
        return [task for name, task in tasks.items() if name in wanted]

    def diverged(self, run: Run) -> bool:
        """Whether the run's training diverged, so that there is no student to assess."""
        ended = Path("artifacts", run.cohort or "", ENDED)
        if run.cohort is None or run.record.exists() or not ended.exists():
            return False
        cohort = read_json(ended, "how a cohort ended")
        if run.name not in cohort["students"]:
            raise UserError(f"{ended.parent}: trained without {run.name}; take another --work")
        return run.name in cohort["diverged"]

    def run(self, arm: Arm, experiment: str) -> Run:
        """The run of an experiment in an arm."""
        return next(run for run in self.runs() if (run.arm, run.experiment) == (arm, experiment))

    def cohort(self, name: str) -> list[Run]:
        """The runs that are trained side by side."""
        return [run for run in self.runs() if run.cohort == name]

    def document(self, arm: Arm) -> dict[str, Any]:
        """The params of an arm; a UserError while the search it needs is not over."""
        document = copy.deepcopy(self._base)
        if self.gsm8k:
            rows = {key: document["dataset"][key] for key in ("answers", "train_rows", "test_rows")}
            document["dataset"] = {"source": "folder", "path": str(self.gsm8k), **rows}
        condition = self._condition(arm)
        changes = {"profile": arm.profile, "seed": self.study.seeds[0] if arm.seed is None else arm.seed}
        if arm.condition == "untrained":
            changes |= self.study.untrained[arm.teacher].params
        elif arm.condition == "rows":
            changes["dataset.train_rows"] = ALL_ROWS
        elif arm != DATA:
            changes |= self.study.teachers[arm.teacher].params | condition.params
            changes |= self.study.search if arm.condition == "search" else {}
        for key, value in changes.items():
            _set(document, key, value)
        # An adapter whose prompt this teacher is not asked behind is no student of it.
        stores = ["data", *(f"teacher/{prompt}" for prompt in document["prompts"])]
        document["adapters"] = {n: a for n, a in document["adapters"].items() if a["needs"] in stores}
        students = ["data", *(f"adapters/{name}" for name in document["adapters"])]
        document["experiments"] = {n: e for n, e in document["experiments"].items() if e["needs"] in students}
        if condition.searched and not arm.condition.startswith("capture-"):  # which wait for no search
            found = self.searched(arm.teacher)
            document["distill"] |= {key: found[key] for key in condition.searched}
        return document

    def write_params(self, arm: Arm) -> Config:
        """Write the arm's params file, and let it share data and teacher with the arms that have the same."""
        document, text = self.document(arm), StringIO()
        if arm.params.exists() and _lasting(read_mapping(arm.params, TOGETHER)) != _lasting(document):
            raise UserError(
                f"{arm.params}: conditions.yaml or params.yaml changed since; change them back, or take another --work"
            )
        YAML().dump(document, text)
        # Other tasks of the arm write and read the same file meanwhile.
        with whole_file(arm.params, PARAMS / f".{arm.profile}-{os.getpid()}") as work:
            write_text(work, text.getvalue())
        if arm.condition not in ("rows", "data"):
            _link(arm.at("data"), DATA.at("data"))
        capture = self._capture_arm(arm)
        if capture and capture != arm:
            _link(arm.at("teacher"), capture.at("teacher"))
        return load_config(arm.params)

    def searched(self, teacher: str) -> dict[str, Any]:
        """What the search found for a teacher, among it the values under `distill`."""
        found: dict[str, Any] = read_json(self.best(teacher), f"what the search for the {teacher} teacher found")
        return found

    def best(self, teacher: str) -> Path:
        """Where the search for a teacher leaves what it found."""
        return self._search_arm(teacher).at("search", self.study.teachers[teacher].search, "result", "best.json")

    def start(self, teacher: str) -> Path:
        """Where the untrained student's distance from a teacher is measured."""
        return Arm("capture-aligned", teacher, None).at("measures", "no-distillation-matched.json")

    def _adapters(self, condition: str, teacher: str) -> list[str]:
        only = self.study.conditions[condition].adapters
        return [name for name in self.study.teachers[teacher].adapters if only is None or name in only]

    def _preparations(self) -> Iterator[Task]:
        yield Task("data", [_kd(DATA, DATA.at("data"), "prepare")], DATA)
        if TUNED not in {*self.study.teachers, *self.study.untrained}:
            return
        rows = Arm("rows", "self", None)
        yield Task("rows", [_kd(rows, rows.at("data"), "prepare")], rows)
        yield Task("tuned-teacher", [Step(["tune"], TUNED_TEACHER)], rows, ["rows"], load=20)

    def _captures(self) -> Iterator[Task]:
        """Each teacher's rows once for every kind of reading; and how far the untrained student is from it."""
        wanted: dict[Arm, set[str]] = {}
        searches = [(self._search_arm(name), self.study.teachers[name].search) for name in self._searched_teachers()]
        for arm, experiment in [*((run.arm, run.experiment) for run in self.runs()), *searches]:
            capture = self._capture_arm(arm)
            if capture:
                wanted.setdefault(capture, set())
                config = validated(Config, self.document(capture), str(capture.params), "profiles/mini.yaml")
                prompt = prompt_of(config, experiment)
                wanted[capture] |= {prompt} if prompt else set()
        for arm, prompts in wanted.items():
            steps = [_kd(arm, arm.at("teacher", "head"), "head")]
            steps += [_kd(arm, arm.at("teacher", prompt), "teacher", prompt) for prompt in sorted(prompts)]
            if arm.condition == "capture-aligned":
                steps.append(_kd(arm, self.start(arm.teacher), "measure", "no-distillation-matched"))
            yield Task(arm.profile, steps, arm, ["data", *self._teacher_task(arm.teacher)])

    def _searches(self) -> Iterator[Task]:
        for name in self._searched_teachers():
            arm = self._search_arm(name)
            step = _kd(arm, self.best(name), "search", self.study.teachers[name].search)
            yield Task(arm.profile, [step], arm, [f"capture-aligned-{name}"], self._base["search"]["together"])

    def _searched_teachers(self) -> list[str]:
        wanted = any(condition.searched for condition in self.study.conditions.values())
        return list(self.study.teachers) if wanted else []

    def _cohorts(self) -> Iterator[Task]:
        for name in dict.fromkeys(run.cohort for run in self.runs() if run.cohort):
            runs = self.cohort(name)
            needs = {capture.profile for run in runs if (capture := self._capture_arm(run.arm))}
            if self._condition(runs[0].arm).searched:
                needs.add(self._search_arm(runs[0].arm.teacher).profile)
            step = Step(["cohort", name], Path("artifacts", name))
            yield Task(name, [step], runs[0].arm, sorted(needs), len(runs))

    def _run_task(self, run: Run) -> Task:
        arm = run.arm
        made = {
            "assess": arm.at("logs", f"{run.experiment}.csv"),
            "measure": arm.at("measures", f"{run.experiment}.json"),
        }
        steps = [Step(command, made[command[0]]) for command in run.commands]
        needs = [run.cohort] if run.cohort else ["data", *self._teacher_task(arm.teacher)]
        record = Step(["record", run.experiment], run.record)
        return Task(run.name, [*steps, record], arm, needs)

    def _condition(self, arm: Arm) -> Condition:
        """What the arm changes; a capture has it from the conditions that share it."""
        conditions = self.study.conditions
        if arm.condition in conditions:
            return conditions[arm.condition]
        if arm.condition.startswith("capture-"):
            return next(c for name, c in conditions.items() if self._capture_arm(Arm(name, arm.teacher, None)) == arm)
        return Condition()

    def _teacher_task(self, teacher: str) -> list[str]:
        return ["tuned-teacher"] if teacher == TUNED else []

    def _search_arm(self, teacher: str) -> Arm:
        return Arm("search", teacher, None)

    def _check_names(self) -> None:
        """Refuse names that conditions.yaml has of what is not there."""
        if len(set(self.study.seeds)) < len(self.study.seeds):
            raise UserError(f"{self.conditions}: seeds: one is there twice; give each run a seed of its own")
        params = str(self.conditions.with_name("params.yaml"))
        base = validated(Config, self._base, params, "profiles/mini.yaml")
        adapters, experiments = base.adapters, base.experiments
        for teacher in self.study.teachers.values():
            for name in (*teacher.adapters, teacher.search):
                choose(name, adapters, "adapter", "adapters")
        for condition in self.study.conditions.values():
            for name in condition.adapters or []:
                choose(name, adapters, "adapter", "adapters")
        for untrained in self.study.untrained.values():
            for name in untrained.experiments:
                choose(name, experiments, "experiment", "experiments")
        reference, conditions = self.study.reference, list(self.study.conditions)
        named = [reference.quirks.condition, *reference.conditions, *reference.conditions.values()]
        for name in named:
            if name not in conditions:
                raise UserError(
                    f"{self.conditions}: reference: {name}: no such condition; one of {', '.join(conditions)}"
                )
        if TUNED in {*self.study.teachers, *self.study.untrained} and not self.study.tuned_teacher:
            raise UserError(f"{self.conditions}: tuned_teacher: missing; it says how the {TUNED} teacher is made")

    def _capture_arm(self, arm: Arm) -> Arm | None:
        """The arm that captures this one's teacher; arms with the same teacher and reading share it."""
        if arm.condition in ("untrained", "rows", "data"):
            return None
        if arm.condition.startswith("capture-"):
            return arm
        params = self._condition(arm).params
        kind = params.get("distill.protocol", "aligned")
        readings = [quirk for quirk in params.get("distill.quirks", []) if quirk in ("bos", "prompt-offset")]
        return Arm("-".join(["capture", kind, *readings]), arm.teacher, None)


def prompt_of(config: Config, experiment: str) -> str | None:
    """The prompt whose teacher an experiment's student learns from, None for a student without a teacher."""
    adapter = config.experiments[experiment].adapter
    return config.adapters[adapter].prompt if adapter else None


def _kd(arm: Arm, made: Path, *command: str) -> Step:
    return Step([*command, "--params", str(arm.params)], made)


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        if not isinstance(document.get(name), dict):
            raise UserError(f"{key}: params.yaml has no mapping {name!r} to change it in")
        document = document[name]
    document[last] = value


def _lasting(document: dict[str, Any]) -> dict[str, Any]:
    """A params document without where GSM8K lies, which changes no result."""
    where = ("source", "path", "name", "revision")
    return document | {"dataset": {key: value for key, value in document["dataset"].items() if key not in where}}


def _link(link: Path, target: Path) -> None:
    """Let `link` stand for `target`, beside it under artifacts/."""
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(Path("..", target.parent.name, target.name))
    except FileExistsError:  # another task of the arm was here first
        return
    except OSError as error:
        raise UserError(
            f"{link.absolute()}: a study's runs share data and teachers by links, which this disk does not take "
            f"({error.strerror}); name a folder on another disk with --work"
        ) from None
