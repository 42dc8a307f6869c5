"""What a study runs: its conditions as params files, and its work as tasks, each a few commands in order."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from ruamel.yaml import YAML

from kd.config import Config, Name, Params, Seeds, load_config, read_mapping, run_name, validated
from kd.errors import UserError
from kd.io.files import read_json, whole_file, write_text
from kd.study.results import Question

STUDY = "study.yaml"
EXAMPLE = "studies/priming/study.yaml"
MEND = f"{EXAMPLE} is one"
PARAMS = Path("params")
DATA = "data"  # the profile whose rows all others share
OWN = "self"  # the model that is the student's own
SEARCHED = ("alpha", "temperature", "learning_rate")
FREE = ("distill", "search", "assess")  # sections in which conditions differ
READINGS = ("no-end", "bos", "prompt-offset")  # quirks that change what a teacher reads, or which rows are kept
ENDED = "cohort.json"  # which `train_cohort` leaves


class Tuned(Params):
    """A teacher that is made first: the student's own model, fully fine-tuned on the training rows of other params."""

    params: dict[str, Any]
    epochs: int = Field(gt=0)
    batch_rows: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    max_tokens: int = Field(gt=0)


class Shaped(Params):
    """Params that differ from the study's, by their dotted keys, and the teacher."""

    params: dict[str, Any] = Field(default={})
    teacher: Name = OWN


class Search(Shaped):
    """A `kd search` for the values of one student."""

    student: Name


class Condition(Shaped):
    """Students and how they are trained and asked: by which search's `values`, and in which `cohort` (None: its own).

    `model` are students that are a teacher themselves; `trained_in` is the condition whose students this one asks
    again in another way, and trains none.
    """

    students: list[Name] = Field(min_length=1)
    model: Name = OWN
    values: Name | None = None
    cohort: Name | None = None
    trained_in: Name | None = None


class Study(Params):
    """study.yaml. `margin` is the difference in accuracy below which two students count as equal, `control` the
    untrained student: one that training left worse has collapsed."""

    study: Name
    question: str
    seeds: Seeds
    margin: float = Field(gt=0, lt=1)
    control: str
    params: dict[str, Any]
    teachers: dict[Name, Tuned] = Field(default={})
    searches: dict[Name, Search] = Field(default={})
    conditions: dict[Name, Condition] = Field(min_length=1)
    questions: dict[Name, Question]


@dataclass(frozen=True)
class Run:
    """One student with one seed (None: not trained), assessed and measured. Its params and results are those of `arm`,
    a condition. `cohort` is the task that trains it beside others, in the condition `trained_in`."""

    arm: str
    student: str
    seed: int | None
    cohort: str | None
    trained_in: str

    @property
    def file(self) -> str:
        """What its log and its adapter are called."""
        return self.student if self.seed is None else run_name(self.student, self.seed)

    @property
    def name(self) -> str:
        """Its name as a task."""
        return f"{self.arm}/{self.file}"


@dataclass(frozen=True)
class Step:
    """A command of a task, done when `made` is there: `tune`, `cohort` or, without the `kd`, one of `kd`."""

    command: list[str]
    made: Path


@dataclass(frozen=True)
class Task:
    """Steps in order, in a process of their own. `arms` are the profiles whose params shape what they make; the steps
    read the first one's file. One that is `heavy` takes much of a GPU."""

    kind: Literal["data", "teacher", "capture", "search", "cohort", "run"]
    name: str
    steps: list[Step]
    arms: list[str]
    needs: list[str] = field(default_factory=list)
    heavy: bool = False


class Plan:
    """A study. All paths but the YAML's are relative to the working folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = validated(Study, read_mapping(path, MEND), str(path), EXAMPLE)
        self.config = validated(Config, self.study.params, f"{path}: params", EXAMPLE)
        self._shaped: dict[str, Condition | Search] = {**self.study.conditions, **self.study.searches}
        self._check()
        self.runs = list(self._runs())
        self.tasks = {task.name: task for task in self._tasks()}

    @property
    def name(self) -> str:
        """The study's folder, as a command in the checkout names it."""
        return f"studies/{self.path.parent.name}"

    def task(self, name: str) -> Task:
        """The task of that name."""
        if name not in self.tasks:
            raise UserError(f"{name}: no such task; one of {', '.join(self.tasks)}")
        return self.tasks[name]

    def run(self, task: Task) -> Run:
        """The run that a task of that kind is."""
        return next(run for run in self.runs if run.name == task.name)

    def cohort(self, name: str) -> list[Run]:
        """The runs that are trained side by side."""
        return [run for run in self.runs if run.cohort == name and run.trained_in == run.arm]

    def adapters(self, name: str) -> list[Path]:
        """What a cohort that ended has made: the adapters of its runs that did not diverge."""
        return [at(run.arm, "adapters", run.file) for run in self.cohort(name) if not self.diverged(run)]

    def diverged(self, run: Run) -> bool:
        """Whether the run's training diverged, so that there is no student to assess."""
        if not run.cohort:
            return False
        return f"{run.trained_in}/{run.file}" in read_json(at(run.cohort, ENDED), "how a cohort ended")["diverged"]

    def settings(self, task: Task) -> dict[str, Any]:
        """All that shapes what a task makes, but for its inputs."""
        tuned = {"tune": self.study.teachers[task.name].model_dump()} if task.kind == "teacher" else {}
        return {"params": {arm: self.document(arm) for arm in task.arms}} | tuned

    def document(self, arm: str) -> dict[str, Any]:
        """The params of a profile; a UserError while the search whose values it takes is not over."""
        changes, condition = self._changes(arm), self.study.conditions.get(arm)
        if condition and condition.values:
            found = read_json(self.best(condition.values), f"what {condition.values} found")["distill"]
            changes |= {f"distill.{key}": found[key] for key in SEARCHED}
        return self._changed(arm, changes)

    def _changed(self, arm: str, changes: dict[str, Any]) -> dict[str, Any]:
        document = copy.deepcopy(self.study.params)
        for key, value in ({"profile": arm, "seeds": self.study.seeds} | changes).items():
            _set(document, key, value, f"{self.path}: {arm}: params")
        return document

    def write_params(self, arm: str) -> Config:
        """Write a profile's params file, and let it share data, teacher and students with those that have the same."""
        text = StringIO()
        YAML().dump(self.document(arm), text)
        # Other tasks of the profile write and read the same file meanwhile.
        with whole_file(params_file(arm), PARAMS / f".{arm}-{os.getpid()}") as work:
            write_text(work, text.getvalue())
        if arm != DATA and arm not in self.study.teachers:
            _link(at(arm, "data"), at(DATA, "data"))
        if shaped := self.study.conditions.get(arm) or self.study.searches.get(arm):
            _link(at(arm, "teacher"), at(self.capture(shaped), "teacher"))
        if isinstance(shaped, Condition) and shaped.trained_in:
            _link(at(arm, "adapters"), at(shaped.trained_in, "adapters"))
        return load_config(params_file(arm))

    def best(self, search: str) -> Path:
        """Where a search leaves what it found."""
        return at(search, "search", self.study.searches[search].student, "result", "best.json")

    def capture(self, shaped: Shaped) -> str:
        """The profile in which a teacher is captured; what has the same teacher and reading shares it."""
        reading = self._reading(shaped)
        return "-".join(["capture", shaped.teacher, reading["distill.protocol"], *reading["distill.quirks"]])

    def _reading(self, shaped: Shaped) -> dict[str, Any]:
        """The params that say what a teacher reads, by dotted keys."""
        quirks = shaped.params.get("distill.quirks", self.config.distill.quirks)
        return {
            "distill.protocol": shaped.params.get("distill.protocol", self.config.distill.protocol),
            "distill.quirks": [quirk for quirk in READINGS if quirk in quirks],
        }

    def _changes(self, arm: str) -> dict[str, Any]:
        """What a profile changes in the study's params, by dotted keys, but for what a search finds."""
        study = self.study
        if arm == DATA:
            return {}
        if arm in study.teachers:
            return study.teachers[arm].params
        if arm in study.searches:
            return _model("teacher", study.searches[arm].teacher) | study.searches[arm].params
        if arm not in study.conditions:
            shaped = next(one for one in self._shaped.values() if self.capture(one) == arm)
            return _model("teacher", shaped.teacher) | self._reading(shaped)
        condition = study.conditions[arm]
        return _model("teacher", condition.teacher) | _model("student", condition.model) | condition.params

    def _runs(self) -> Iterator[Run]:
        """Every run, in the order of the tables; what is not trained runs once."""
        for arm, condition in self.study.conditions.items():
            trained_in = condition.trained_in or arm
            cohort = f"cohort-{self.study.conditions[trained_in].cohort or trained_in}"
            for student in condition.students:
                trained = student in self.config.students
                for seed in self.study.seeds if trained else [None]:
                    yield Run(arm, student, seed, cohort if trained else None, trained_in)

    def _tasks(self) -> Iterator[Task]:
        """All work, what others wait for first."""
        study = self.study
        yield Task("data", DATA, [_kd(DATA, at(DATA, "data"), "prepare")], [DATA])
        for name in study.teachers:
            steps = [_kd(name, at(name, "data"), "prepare"), Step(["tune"], at(name, "model"))]
            yield Task("teacher", name, steps, [name], [DATA], heavy=True)
        yield from self._captures()
        for name, search in study.searches.items():
            step = _kd(name, self.best(name), "search", search.student)
            yield Task("search", name, [step], [name], [self.capture(search)], heavy=True)
        for name in dict.fromkeys(run.cohort for run in self.runs if run.cohort):
            conditions = {run.arm: study.conditions[run.arm] for run in self.cohort(name)}
            needs = [self.capture(one) for one in conditions.values()]
            needs += [one.values for one in conditions.values() if one.values]
            step = Step(["cohort", name], at(name))
            yield Task("cohort", name, [step], list(conditions), list(dict.fromkeys(needs)), heavy=True)
        yield from map(self._run_task, self.runs)

    def _captures(self) -> Iterator[Task]:
        """Each teacher's rows once for every kind of reading."""
        wanted: dict[str, tuple[str, set[str]]] = {}
        students = [(self.study.conditions[run.arm], run.student) for run in self.runs if run.cohort]
        for shaped, student in [*students, *((search, search.student) for search in self.study.searches.values())]:
            _, prompts = wanted.setdefault(self.capture(shaped), (shaped.teacher, set()))
            if (prompt := self.config.students[student]) is not None:
                prompts.add(prompt)
        for arm, (teacher, prompts) in wanted.items():
            steps = [_kd(arm, at(arm, "teacher", "head"), "head")]
            steps += [_kd(arm, at(arm, "teacher", prompt), "teacher", prompt) for prompt in sorted(prompts)]
            yield Task("capture", arm, steps, [arm], [DATA, *_made_first(teacher)])

    def _run_task(self, run: Run) -> Task:
        condition = self.study.conditions[run.arm]
        made = {
            "assess": at(run.arm, "logs", f"{run.file}.csv"),
            "measure": at(run.arm, "measures", f"{run.file}.json"),
        }
        steps = [_kd(run.arm, path, stage, run.file) for stage, path in made.items()]
        needs = [run.cohort or DATA, *_made_first(condition.teacher), *_made_first(condition.model)]
        return Task("run", run.name, steps, [run.arm], list(dict.fromkeys(needs)))

    def _check(self) -> None:
        """Refuse names of what is not there, and params that a condition cannot have for itself."""
        study, config = self.study, self.config
        for name, shaped in self._shaped.items():
            where = f"{self.path}: {name}"
            for key in shaped.params:
                if key.split(".")[0] not in FREE:
                    raise UserError(
                        f"{where}: params: {key}: conditions have data, prompts and models in common; of params they "
                        f"change {', '.join(FREE)} alone"
                    )
            validated(Config, self._changed(name, shaped.params), where, EXAMPLE)
            _known(where, "teacher", shaped.teacher, [OWN, *study.teachers])
            if isinstance(shaped, Search):
                _known(where, "student", shaped.student, list(config.students))
                continue
            for student in shaped.students:
                _known(where, "students", student, [*config.students, *config.untrained])
            _known(where, "model", shaped.model, [OWN, *study.teachers])
            _known(where, "values", shaped.values, [None, *study.searches])
            _known(where, "trained_in", shaped.trained_in, [None, *study.conditions])
        for name, tuned in study.teachers.items():
            validated(Config, self._changed(name, tuned.params), f"{self.path}: {name}", EXAMPLE)
        there = [f"{name}/{student}" for name, one in study.conditions.items() for student in one.students]
        _known(str(self.path), "control", study.control, there)
        for name, question in study.questions.items():
            for student in (student for pair in question.pairs for student in pair):
                _known(f"{self.path}: questions.{name}", "pairs", student, there)


def at(arm: str, *parts: str) -> Path:
    """A path among a profile's results."""
    return Path("artifacts", arm, *parts)


def params_file(arm: str) -> Path:
    """A profile's params file."""
    return PARAMS / f"{arm}.yaml"


def _model(role: str, name: str) -> dict[str, Any]:
    return {} if name == OWN else {f"{role}.model": {"source": "folder", "path": str(at(name, "model"))}}


def _made_first(model: str) -> list[str]:
    return [] if model == OWN else [model]


def _known(where: str, key: str, name: str | None, known: Sequence[str | None]) -> None:
    if name not in known:
        raise UserError(f"{where}: {key}: {name}: not there; one of {', '.join(filter(None, known))}")


def _kd(arm: str, made: Path, *command: str) -> Step:
    return Step([*command, "--params", str(params_file(arm))], made)


def _set(document: dict[str, Any], key: str, value: Any, where: str) -> None:
    *outer, last = key.split(".")
    for name in outer:
        if not isinstance(document.get(name), dict):
            raise UserError(f"{where}: {key}: the study's params have no mapping {name!r} to change it in")
        document = document[name]
    document[last] = value


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
