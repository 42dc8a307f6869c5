"""One task of a study, done in this process by `kd`'s own commands, and the record of how it was made.

A record is written before a task begins, with the settings and inputs that shape its result, and again when it ends. So
nothing that was made with others is taken for the same, and results.json can say how each run was made.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.errors import UserError
from kd.io.files import as_json, read_json, sha256, write_whole_file
from kd.machine.record import made_here
from kd.report.packed import pack_right
from kd.scoring.extract import extract
from kd.scoring.log import is_correct, read_answered
from kd.study.plan import DATA, STUDY, Plan, Run, Step, Task, at
from kd.study.results import RULES

RECORDS = Path("tasks")
PARENT = "KD_STUDY_WORKER"  # the process id without which a task does not go on
PR_SET_PDEATHSIG = 1
KEPT_ON_STOP = "what is done is kept, and the same command goes on from there"
KEPT = ("commit", "changed", "versions", "gpus", "driver", "began", "ended")  # of a record, in results.json
UNPRIMED = "base"  # the prompt whose teacher a student without one is compared with


@contextmanager
def at_work(folder: Path, work: Path | None) -> Iterator[Plan]:
    """The plan of the study in `folder`, within its working folder (default: work/ there)."""
    folder = folder.resolve()
    plan = Plan(folder / STUDY)
    work = work or folder / "work"
    if work.is_file():
        raise UserError(f"--work: {work}: is a file; name a folder")
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        yield plan


def do(plan: Plan, name: str, kd: Callable[[list[str]], int]) -> int:
    """Do what is missing of one task, in this process, by `kd`'s own commands; returns the exit status."""
    task = plan.task(name)
    earlier, inputs = _earlier(plan, task), _inputs(task)
    going_on = bool(earlier) and earlier["inputs"] == inputs  # else what is there was made of something else
    began = datetime.fromisoformat(earlier["began"]) if going_on else datetime.now().astimezone()
    record = {"began": began.isoformat(timespec="seconds"), "settings": plan.settings(task), "inputs": inputs}
    write_whole_file(_file(name), as_json(record))
    run = plan.run(task) if task.kind == "run" else None
    configs = {arm: plan.write_params(arm) for arm in task.arms}
    diverged = run is not None and plan.diverged(run)
    for step in [] if diverged else task.steps:
        if going_on and _is_there(plan, task, step):
            continue
        if status := _do_step(plan, step.command, configs[task.arms[0]], step.made, kd):
            return status
    record |= {"made": _digest(plan, task)} | made_here(began)
    if run:
        record["result"] = _result(plan, run, configs[run.arm], diverged)
    write_whole_file(_file(name), as_json(record))
    return 0


def end_with_worker() -> None:
    """Let the system end this process, a task's, with the worker that has started it, however that ends."""
    if parent := os.environ.get(PARENT):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)


def missing(plan: Plan) -> list[Task]:
    """Of the tasks, those of runs that are not done, and what these need that is not there: a teacher or an adapter
    whose runs are over may be gone."""
    wanted: set[str] = set()
    names = [run.name for run in plan.runs]
    while names:
        task = plan.task(names.pop())
        if task.name not in wanted and not done(plan, task):
            wanted.add(task.name)
            names += task.needs
    return [task for name, task in plan.tasks.items() if name in wanted]


def done(plan: Plan, task: Task) -> bool:
    """Whether a task was done with the settings it has now, and the inputs that are there now."""
    earlier = _earlier(plan, task)
    there = all(_is_there(plan, task, step) for step in task.steps) or earlier.get("result", {}).get("diverged", False)
    return "made" in earlier and there and earlier["inputs"] == _inputs(task)


def result_of(run: Run) -> dict[str, Any]:
    """What results.json has of a run that is done: what came of it, and how it was made."""
    records = {name: read_json(_file(name), "a task's record") for name in (run.cohort, run.name) if name}
    made = {name: {key: record[key] for key in KEPT} for name, record in records.items()}
    result: dict[str, Any] = records[run.name]["result"]
    return result | {"made": made}


def _earlier(plan: Plan, task: Task) -> dict[str, Any]:
    """The task's record, empty where it was never begun; a UserError where it was begun with other settings."""
    file = _file(task.name)
    if not file.exists():
        return {}
    record: dict[str, Any] = read_json(file, "a task's record")
    changed = next(_differences(record["settings"], plan.settings(task)), None)
    if changed:
        key, before, now = changed
        raise UserError(
            f"{task.name}: ran with {key.removeprefix('params.')} {before!r}, and {plan.path} has {now!r} now; change "
            "it back, or take another --work"
        )
    return record


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key, dotted, under which two documents differ, and what both have there (None: nothing)."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".removeprefix("."))
    elif before != now:
        yield key, before, now


def _inputs(task: Task) -> dict[str, Any]:
    """The checksum of what each needed task has made, None where that is not done."""
    records = {need: read_json(_file(need), "a task's record") for need in task.needs if _file(need).exists()}
    return {need: records.get(need, {}).get("made") for need in task.needs}


def _is_there(plan: Plan, task: Task, step: Step) -> bool:
    """Whether all that a step makes is there: a cohort that ended may have lost its adapters since."""
    there = step.made.exists()
    return there and (task.kind != "cohort" or all(adapter.exists() for adapter in plan.adapters(task.name)))


def _digest(plan: Plan, task: Task) -> str:
    """A checksum of all files that a task has made."""
    made = [step.made for step in task.steps] + (plan.adapters(task.name) if task.kind == "cohort" else [])
    files = sorted(file for path in made for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return hashlib.sha256(as_json([(file.as_posix(), sha256(file)) for file in files]).encode()).hexdigest()


def _do_step(plan: Plan, command: list[str], config: Config, made: Path, kd: Callable[[list[str]], int]) -> int:
    match command:
        case ["cohort", name]:
            from kd.distill.cohort import train_cohort

            train_cohort([(plan.write_params(run.arm), run.file) for run in plan.cohort(name)], made)
            return 0
        case ["tune"]:
            from kd.study.teacher import tune

            tune(config, plan.study.teachers[config.profile], at(DATA, "data"), made)
            return 0
    print("$ kd", *command, file=sys.stderr)
    return kd(command)


def _result(plan: Plan, run: Run, config: Config, diverged: bool) -> dict[str, Any]:
    """What came of a run; one whose training diverged answers nothing, and has nothing right."""
    prompt = plan.config.students.get(run.student)
    about = {
        "condition": run.arm,
        "student": run.student,
        "seed": run.seed,
        "teacher": plan.study.conditions[run.arm].teacher if prompt is not None else None,
        "prompt": prompt,
        "command": " && ".join(f"kd study task {plan.name} {task}" for task in (run.cohort, run.name) if task),
        "diverged": diverged,
    }
    if diverged:
        rows = config.dataset.test_rows
        nothing = {"correct": 0, "undecided": rows, "right": pack_right([False] * rows)}
        lost = dict.fromkeys(("answer_loss", "divergence", "mean_tokens", "at_limit"))
        return about | {"rules": dict.fromkeys(RULES, nothing)} | lost | {"files": {"log": None, "adapter": None}}
    answered = read_answered(config, run.file)
    measured = read_json(at(run.arm, "measures", f"{run.file}.json"), "a run's measures")
    adapter = at(run.arm, "adapters", run.file, "adapter_model.safetensors")
    return about | {
        "rules": {rules: _scored(answered, rules) for rules in RULES},
        "answer_loss": measured["answer_loss"],
        "divergence": measured["divergence"].get(prompt or UNPRIMED),
        "mean_tokens": sum(row.tokens for row in answered) / len(answered),
        "at_limit": sum(row.reached_limit for row in answered),
        "files": {
            "log": sha256(at(run.arm, "logs", f"{run.file}.csv")),
            "adapter": sha256(adapter) if adapter.exists() else None,
        },
    }


def _scored(answered: list[Any], rules: str) -> dict[str, Any]:
    found = list(extract((row.response for row in answered), rules))
    right = [is_correct(one.answer, row.answer) for one, row in zip(found, answered, strict=True)]
    return {"correct": sum(right), "undecided": sum(one.answer is None for one in found), "right": pack_right(right)}


def _file(name: str) -> Path:
    return RECORDS / f"{name}.json"
