"""`kd study`: a study's tasks, several at a time, and what comes of them.

Results lie in the work folder, whole or absent, so a go that was ended, by its time or by anything else, goes on with
the same command. Every task is a process of its own that runs `kd` commands; what it says is in said/ there.
"""

from __future__ import annotations

import lzma
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.data.rows import read_examples
from kd.errors import UserError
from kd.io.distributed import gpu_names
from kd.io.files import as_json, read_json, sha256, whole_folder, write_whole_file
from kd.io.progress import progress
from kd.machine.probe import Gpu, read_driver, read_gpus
from kd.scoring.extract import extract
from kd.scoring.log import is_correct, read_answered
from kd.study.plan import CONDITIONS, DATA, Arm, Plan, Run, Task, prompt_of
from kd.study.results import check_study, pack_right, read_study, summarise
from kd.study.tables import with_tables

RULES = ("documented", "robust")
UNPRIMED = "base"  # the prompt whose teacher a student without one is compared with
SAID = Path("said")
MACHINE = Path("artifacts/machine.json")
RESULTS, README, LOGS = "results.json", "README.md", "logs"
PACKAGES = ("torch", "transformers", "peft", "optuna", "numpy")
POLL_S = 0.2
JOBS = 6  # an assessment takes 4 GiB, a cohort of 15 as much as 16


@contextmanager
def at_work(folder: Path, work: Path | None, gsm8k: Path | None) -> Iterator[Plan]:
    """The plan of the study in `folder`, within its working folder (default: work/ there)."""
    folder, gsm8k = folder.resolve(), gsm8k and gsm8k.resolve()
    if gsm8k and not gsm8k.is_dir():
        raise UserError(f"--gsm8k: {gsm8k}: no such folder; name the one that holds train.jsonl and test.jsonl")
    plan = Plan(folder / CONDITIONS, gsm8k)
    work = work or folder / "work"
    if work.is_file():
        raise UserError(f"--work: {work}: is a file; name a folder")
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        try:
            yield plan
        except KeyboardInterrupt as stop:
            raise type(stop)("what is done is kept, and the same command goes on from there") from None


def run(plan: Plan, jobs: int | None, minutes: float | None) -> int:
    """Run what is missing, `jobs` at a time, until all is done or the minutes are over; returns the exit status."""
    total = len(plan.tasks())
    tasks = {task.name: task for task in plan.missing()}  # without those done
    done: set[str] = set()
    failed: set[str] = set()
    running: dict[str, tuple[subprocess.Popen[bytes], str | None]] = {}  # with its GPU
    found = read_gpus()
    if tasks:
        write_whole_file(MACHINE, as_json(_machine(found)))
    gpus = gpu_names(len(found))
    jobs = jobs or JOBS * len(gpus) or 1
    deadline = time.monotonic() + 60 * (minutes or float("inf"))
    with progress((), "study", "task", total) as bar, _ended_with_us(running):
        bar.update(total - len(tasks))
        while time.monotonic() < deadline:
            begun = done | failed | running.keys()
            waiting = tasks.keys() - done
            ready = [task for name, task in tasks.items() if name not in begun and waiting.isdisjoint(task.needs)]
            for task in ready[: jobs - len(running)]:
                loads = {gpu: sum(tasks[name].load for name, (_, its) in running.items() if its == gpu) for gpu in gpus}
                gpu = min(gpus, key=loads.__getitem__, default=None)
                running[task.name] = _start(plan, task, gpu), gpu
            if not running:
                break
            time.sleep(POLL_S)
            for name, (process, _) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    (failed if process.returncode else done).add(name)
                    bar.update()
                    if process.returncode:
                        bar.write(f"{name} failed: {_last_words(name)}", file=sys.stderr)
                    for run in filter(plan.diverged, plan.cohort(name)):
                        done.add(run.name)
                        bar.update()
                        bar.write(f"{run.name} diverged in training and is not assessed", file=sys.stderr)
    if len(done) < len(tasks):
        left = len(tasks) - len(done)
        print(f"kd: {total - left} of {total} tasks are done; the same command goes on", file=sys.stderr)
    return int(len(done) < len(tasks))


def do(plan: Plan, name: str, kd: Callable[[list[str]], int]) -> int:
    """Do what is missing of one task, in this process, by `kd`'s own commands; returns the exit status."""
    task = _task(plan, name)
    config = plan.write_params(task.arm)
    for step in task.steps:
        if step.made.exists():
            continue
        match step.command:
            case ["record", experiment]:
                write_whole_file(step.made, as_json(record(config, plan.run(task.arm, experiment), plan.name)))
            case ["cohort", name]:
                from kd.distill.cohort import train_cohort

                members = [(plan.write_params(run.arm), run.experiment) for run in plan.cohort(name)]
                train_cohort(members, step.made)
            case ["tune"]:
                from kd.study.teacher import tune

                assert plan.study.tuned_teacher
                tune(config, plan.study.tuned_teacher)
            case command:
                print("$ kd", *command, file=sys.stderr)
                if status := kd(command):
                    return status
    return 0


def _task(plan: Plan, name: str) -> Task:
    found = [task for task in plan.tasks() if task.name == name]
    if not found:
        raise UserError(f"{name}: no such task; one of {', '.join(task.name for task in plan.tasks())}")
    return found[0]


def record(config: Config, run: Run, study: str) -> dict[str, Any]:
    """What `results.json` has of one run of the study whose folder is called `study`."""
    arm, experiment = run.arm, run.experiment
    answered = read_answered(config, experiment)
    adapter = arm.at("adapters", experiment)
    measured = read_json(arm.at("measures", f"{experiment}.json"), "a run's measures")
    prompt = prompt_of(config, experiment)
    return {
        "condition": arm.condition,
        "experiment": experiment,
        "seed": arm.seed,
        "teacher": arm.teacher,
        "prompt": prompt,
        "command": " && ".join(f"kd study task {study} {task}" for task in (run.cohort, run.name) if task),
        "rules": {rules: _scored(answered, rules) for rules in RULES},
        "answer_loss": measured["answer_loss"],
        "divergence": measured["divergence"].get(prompt or UNPRIMED),
        "mean_tokens": sum(row.tokens for row in answered) / len(answered),
        "at_limit": sum(row.reached_limit for row in answered),
        "files": {
            "log": sha256(arm.at("logs", f"{experiment}.csv")),
            "adapter": sha256(adapter / "adapter_model.safetensors") if adapter.exists() else None,
        },
    }


def results(plan: Plan) -> None:
    """Write results.json and the README's tables from the runs there are, and compress their logs for DVC."""
    folder, name = plan.conditions.parent, plan.name
    runs = [run for run in plan.runs() if run.record.exists()]
    diverged = [run.name for run in plan.runs() if plan.diverged(run)]
    missing = len(plan.runs()) - len(runs) - len(diverged)
    if not runs:
        raise UserError(f"{Path.cwd()}: no run is done; `kd study run {name}` makes them")
    if diverged:
        print(f"kd: diverged in training, and so in no table: {', '.join(diverged)}", file=sys.stderr)
    if missing:
        print(f"kd: {missing} of {len(plan.runs())} runs are missing", file=sys.stderr)
    records = [read_json(run.record, "a run") for run in runs]
    machine, tuned = read_json(MACHINE, "the machine that ran the study"), plan.study.tuned_teacher
    document = {
        "study": plan.study.study,
        "question": plan.study.question,
        "rows": {split: len(read_examples(DATA.at("data", f"{split}.jsonl"))) for split in ("train", "test")},
        **machine,
        "settings": {"search": plan.study.search, "tuned_teacher": tuned.model_dump() if tuned else None}
        | {arm.profile: _settings(plan, arm) for arm in dict.fromkeys(run.arm for run in runs)},
        "search": {
            teacher: read_json(plan.best(teacher), "a search")
            for teacher in plan.study.teachers
            if plan.best(teacher).exists()
        },
        "commands": {
            "runs": f"kd study run {name}",
            "results": f"kd study results {name}",
            "tables": f"kd report --study {name}/{RESULTS}",
        },
        "starting_divergence": {
            teacher: read_json(plan.start(teacher), "a measure")["divergence"]
            for teacher in plan.study.teachers
            if plan.start(teacher).exists()
        },
        "reference": plan.study.reference.model_dump(),
        "planned": len(plan.runs()),
        "diverged": diverged,
        "runs": records,
    }
    document["summary"] = summarise(document)
    check_study(document, folder / RESULTS)
    write_whole_file(folder / RESULTS, as_json(document))
    readme = folder / README
    if readme.exists():
        write_whole_file(readme, with_tables(readme.read_text(encoding="utf-8"), read_study(folder / RESULTS)))
    with whole_folder(folder / LOGS) as logs:
        for run in progress(runs, "compress", "log"):
            log = run.arm.at("logs", f"{run.experiment}.csv").read_bytes()
            (logs / f"{run.arm.profile}-{run.experiment}.csv.xz").write_bytes(lzma.compress(log, preset=9))


def _scored(answered: list[Any], rules: str) -> dict[str, Any]:
    found = list(extract((row.response for row in answered), rules))
    right = [is_correct(one.answer, row.answer) for one, row in zip(found, answered, strict=True)]
    return {"correct": sum(right), "undecided": sum(one.answer is None for one in found), "right": pack_right(right)}


def _settings(plan: Plan, arm: Arm) -> dict[str, Any]:
    """What shaped an arm's runs; not where GSM8K lay."""
    document = plan.document(arm)
    document["dataset"].pop("path", None)
    keys = ("seed", "dataset", "teacher", "student", "distill", "search", "assess", "experiments")
    return {key: document[key] for key in keys}


def _start(plan: Plan, task: Task, gpu: str | None) -> subprocess.Popen[bytes]:
    """Run a task in a process of its own, on one GPU, its output kept in said/."""
    said = SAID / f"{task.name.replace('/', '-')}.log"
    said.parent.mkdir(exist_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    with said.open("ab") as file:
        where = [str(plan.conditions.parent), task.name, *(["--gsm8k", str(plan.gsm8k)] if plan.gsm8k else [])]
        command = [sys.executable, "-m", "kd.cli", "study", "task", *where, "--work", "."]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


@contextmanager
def _ended_with_us(running: dict[str, tuple[subprocess.Popen[bytes], str | None]]) -> Iterator[None]:
    """Whatever ends the block, nothing is left running; what was unfinished goes on next time."""
    try:
        yield
    finally:
        for process, _ in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process, _ in running.values():
            process.wait()


def _last_words(name: str) -> str:
    lines = (SAID / f"{name.replace('/', '-')}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


def _machine(found: tuple[Gpu, ...]) -> dict[str, Any]:
    """What this machine is, as results.json names it."""
    gpus = [gpu.name for gpu in found]
    hardware = {"gpus": gpus, "driver": read_driver() if gpus else None, "cores": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"hardware": hardware, "versions": versions}
