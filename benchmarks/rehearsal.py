"""Whole stages of an experiment beside what `kd rehearse` forecasts for them, on random weights of its models' shapes.

    python benchmarks/rehearsal.py --params profiles/single-gpu.yaml        six minutes on an H100
    python benchmarks/rehearsal.py --params profiles/paper.yaml --states-made-up

The profile is rehearsed; then stages run whole, each in a process of its own, on stand-ins for the models and rows of
all lengths: the head, a teacher's prompt, a student of it and one of labels alone, and their answers; or those that
are named, such as `head "train fine-tuning-1"`. Students train, and answer, side by side where there are several GPUs,
in the places that `kd students` gives them. What is neither a stage's nor forecast is left out: making weights up, and
Triton's compilation. With `--states-made-up` the teacher is not loaded, its states are random: for a profile whose
captures take long. Answers take less than forecast where they end before their limit: their tokens are counted, and
what ended early is in no figure.
Prints a line a stage, and writes benchmarks/results/rehearsal-<profile>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from result import write_result

from kd.cli import main as kd
from kd.config import Config, load_config, run_name
from kd.io.distributed import gpu_names
from kd.machine.lengths import write_rows
from kd.machine.measure import clock
from kd.machine.rehearse import Machine, Rehearsal, rehearse, text
from kd.machine.stand_in import made_up_weights
from kd.machine.students import Place, places_for
from kd.models.load import model_folder
from kd.models.settings import read_settings
from kd.scoring.log import read_log
from kd.teacher import backends

REPOSITORY = Path(__file__).parents[1]
STUDENTS = ("train", "assess")  # what runs side by side
CONTEXT = 2048  # tokens of a question and its answer, at most
LONG = 0.95  # of the tokens up to the limit, at least, where answers go on to it


class RandomStates:
    """A teacher without weights, whose states are random: drawn once, since drawing takes longer than keeping them."""

    def __init__(self, hidden: int) -> None:
        self.drawn = torch.randn(CONTEXT, hidden, dtype=torch.float16)

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        for batch in batches:
            yield [self.drawn[: len(ids)] for ids in batch]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help='such as head "teacher base" "train base-kd-1" "assess base-kd-1"')
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the experiment (params.yaml)")
    parser.add_argument("--states-made-up", action="store_true", help="random states in the place of the teacher's")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        sys.exit(do_stage(options.stage, options.states_made_up))
    params = load_config(options.params)
    stages = options.stages or usual_stages(params)
    document = rehearse(params)
    print(text(document), flush=True)
    forecast = forecasts(document)
    if options.states_made_up:
        forecast = {stage: seconds for stage, seconds in forecast.items() if not stage.startswith("teacher")}
    taken: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".whole-") as name:
        folder = Path(name)
        prepare(params, folder)
        for group in groups(stages, places()):
            with ThreadPoolExecutor(len(group)) as pool:
                runs = [pool.submit(run_stage, folder, stage, place, options.states_made_up) for stage, place in group]
            for (stage, _), run in zip(group, runs, strict=True):
                taken[stage] = run.result() | {"forecast_s": forecast.get(stage)}
                print(line(stage, taken[stage]), flush=True)
    figures = {"rehearsed_s": document["rehearsed_s"]}
    if ratios := [one["forecast_s"] / one["took_s"] for one in taken.values() if is_comparable(one)]:
        figures |= {"forecast_over_taken_least": min(ratios), "forecast_over_taken_most": max(ratios)}
    write_result(f"rehearsal-{params.profile}", figures, {"stages": taken, "rehearsal": document})


def usual_stages(params: Config) -> list[str]:
    """One of each kind, each behind those whose results it reads."""
    seed, bare = params.seeds[0], list(params.untrained)[-1:]
    prompts = list(params.prompts)[:1]
    students = [run_name(f"{prompt}-kd", seed) for prompt in prompts]
    students += [run_name(control, seed) for control in params.controls[:1]]
    captures = ["head", *(f"teacher {prompt}" for prompt in prompts)] if prompts else []
    return [*captures, *(f"train {run}" for run in students), *(f"assess {run}" for run in [*students, *bare])]


def forecasts(document: dict[str, Any]) -> dict[str, float]:
    """Seconds of each process of a rehearsal, by the stage and the name of what it makes."""
    found: dict[str, float] = {}
    for stage in document["stages"]:
        each = {f"{stage['stage']} {name}": seconds for name, seconds in stage["each"].items()}
        found |= each or {stage["stage"]: stage["one_s"]}
    return found


def places() -> list[Place | None]:
    """Where stages run at a time: on each GPU, or once on the whole machine."""
    count = torch.cuda.device_count()
    return [*places_for(gpu_names(count))] if count > 1 else [None]


def groups(stages: list[str], where: list[Place | None]) -> list[list[tuple[str, Place | None]]]:
    """The stages in their order, with their places: those of students together as far as there are places."""
    found: list[list[tuple[str, Place | None]]] = []
    for stage in stages:
        kind = stage.split()[0]
        last = found[-1] if found else []
        if last and kind in STUDENTS and last[0][0].split()[0] == kind and len(last) < len(where):
            last.append((stage, where[len(last)]))
        else:
            found.append([(stage, where[0] if kind in STUDENTS else None)])
    return found


def prepare(params: Config, folder: Path) -> None:
    """A checkout's params, stand-ins and rows of all lengths in `folder`."""
    rehearsal = Rehearsal(params, folder, Machine([], 0.0))  # which is not asked
    size = rehearsal.documents["student"]["vocab_size"]
    for split, lengths in rehearsal.lengths.items():
        write_rows(folder / params.artifacts / "data" / f"{split}.jsonl", lengths, size)
    own = Config.model_validate(rehearsal.task).model_dump(mode="json", exclude_unset=True)
    (folder / "params.yaml").write_text(json.dumps(own))  # which is YAML too
    shutil.copy(REPOSITORY / "dvc.yaml", folder)


def run_stage(folder: Path, stage: str, place: Place | None, states_made_up: bool) -> dict[str, Any]:
    """A stage in a process of its own, whose progress is seen: its seconds, and what else is known of it."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | (place.environment() if place else {})
    command = [sys.executable, __file__, "--stage", stage, *(["--states-made-up"] if states_made_up else [])]
    start = time.time()
    status = subprocess.run(command, cwd=folder, env=variables).returncode
    whole_s = time.time() - start
    if status:
        raise SystemExit(f"{stage} ended with status {status}; what it said stands above")
    found: dict[str, Any] = json.loads((folder / done_file(stage)).read_text())
    return found | {"whole_s": whole_s, "took_s": whole_s - found["made_up_s"] - found["compiled_s"]}


def do_stage(stage: str, states_made_up: bool) -> int:
    """`kd STAGE` in this process, with weights made up; what is not the stage's own comes beside it. Its status."""
    params, (kind, *what) = load_config(Path("params.yaml")), stage.split()
    teacher = kind in ("head", "teacher")
    model = (params.teacher if teacher else params.student).model
    backend = params.teacher.backend if teacher else "transformers"
    if states_made_up:
        hidden = read_settings(model_folder(params.teacher.model)).hidden_size
        backends.load = lambda *_: RandomStates(hidden)
    if not teacher:
        clock.leave_out_compiling()
    with made_up_weights(model, backend) as weights:
        status = kd([kind, *what])
    found: dict[str, Any] = {"made_up_s": weights.seconds, "compiled_s": clock.compiled}
    if kind == "assess":
        tokens = [row.tokens for row in read_log(params, what[0])]
        found |= {"tokens": sum(tokens), "limit": params.experiments[what[0]].max_new_tokens * len(tokens)}
    Path(done_file(stage)).write_text(json.dumps(found))
    return status


def done_file(stage: str) -> str:
    """Where a stage's process says what is known of it."""
    return f"{stage.replace(' ', '-')}.json"


def is_comparable(found: dict[str, Any]) -> bool:
    """Whether a stage has a forecast and did what that is of: answers that go on to their limit."""
    return found["forecast_s"] is not None and found.get("tokens", 0) >= LONG * found.get("limit", 0)


def line(stage: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    forecast, took = found["forecast_s"], found["took_s"]
    said = "no forecast" if forecast is None else f"forecast {forecast:6.1f} s  {forecast / took:5.2f}"
    tokens = f"  {found['tokens']} of {found['limit']} tokens" if "tokens" in found else ""
    early = "" if forecast is None or is_comparable(found) else ": it ended early"
    return f"{stage:40} took {took:6.1f} s  {said}{tokens}{early}"


if __name__ == "__main__":
    main()
