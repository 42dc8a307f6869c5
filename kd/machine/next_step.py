"""`kd` alone: what is here of the experiment in params.yaml, and what to do next.

It looks which results are there, which takes no time. Whether one is still what params.yaml and the code would make is
for DVC to say, so nothing is called up to date here, and what is advised does again whatever is not.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from kd.config import Config
from kd.errors import UserError
from kd.io.files import bench_of, read_json
from kd.machine.stages import Stage, stages_of
from kd.machine.version import CHECKOUT

PIPELINE, PARAMS = Path("dvc.yaml"), Path("params.yaml")
SESSIONS = {"mini": "nox -s mini", "single-gpu": "nox -s single-gpu", "paper": "nox -s paper"}
SHOWN = 3  # names in a line


def without_params() -> list[str]:
    """What to do in a folder that has no params.yaml."""
    checkout = next((folder for folder in Path.cwd().parents if (folder / PIPELINE).exists()), None)
    if PARAMS.is_symlink():  # in the image, before its first session has brought what it leads to
        return ["params.yaml is a link to nothing yet. To begin with the miniature, which brings it:", "  nox -s mini"]
    if PIPELINE.exists():
        return [
            "No params.yaml here, which says what runs. To begin with the miniature, on two CPU cores:",
            "  cp profiles/mini.yaml params.yaml && nox -s mini",
        ]
    if checkout:
        return ["No params.yaml here, but this folder lies in a checkout; go to its top:", f"  cd {_quoted(checkout)}"]
    own = (CHECKOUT / PIPELINE).exists()
    where = "such as its own:" if own else "which Git clones."
    return [
        f"No params.yaml here: experiments run in a checkout of kd, {where}",
        *([f"  cd {_quoted(CHECKOUT)}"] if own else []),
        "Anywhere: `kd extract FILE --column NAME` takes and scores answers; `kd --help` names all commands.",
    ]


def next_step(config: Config) -> list[str]:
    """What is here of an experiment and what comes next, in two to ten lines."""
    title = f"params.yaml: profile {config.profile}, {len(config.students)} students with seeds "
    title += f"{', '.join(map(str, config.seeds))}, {len(config.untrained)} untrained rows"
    stages = list(stages_of(config))
    missing = [stage for stage in stages if not stage.target.exists()]
    lines = [title]
    if begun := [stage.name for stage in stages if bench_of(stage.target).is_dir()]:
        lines.append(f"Begun, and at work or stopped: {_listed(begun)}; what was stopped goes on where it was.")
    if not missing:
        return [*lines, *_finished(config)]
    lines.append(f"Here: {_counted(stages, missing) or 'nothing yet'}.")
    if config.needs.gpus and len(missing) == len(stages):
        lines.append("Before that: `kd doctor`, has this machine what it needs? `kd rehearse`, what will it take?")
    begin = "Next" if len(missing) == len(stages) else f"Next is {missing[0].name}"
    if PIPELINE.exists():
        todo = f"`{_session(config)}` makes what is missing and prints the table; `dvc repro` makes it stage by stage."
    else:
        todo = f"`{missing[0].command}` (there is no dvc.yaml here, so stages are run by hand)."
    return [*lines, f"{begin}: {todo}"]


def _counted(stages: Sequence[Stage], missing: Sequence[Stage]) -> str:
    """The results that are here, those of one kind together."""
    said = []
    for kind, group in groupby(stages, lambda stage: stage.kind):
        made = [stage not in missing for stage in group]
        if any(made):
            said.append(kind if len(made) == 1 else f"{sum(made)} of {len(made)} {kind}")
    return ", ".join(said)


def _session(config: Config) -> str:
    """What makes everything: nox has a session for each profile of ours, and one for any other."""
    return SESSIONS.get(config.profile, "nox -s repro")


def _finished(config: Config) -> list[str]:
    """Where the results are, what is left to do about them, and what to do with them."""
    folder = config.artifacts / "report"
    results = folder / "results.json"
    try:
        document = read_json(results, "the report's results")
        rows = [run for row in document["experiments"].values() for run in row["runs"]]
        undecided = {run["name"]: len(run["undecided"]) for run in rows}
    except (UserError, AttributeError, LookupError, TypeError):
        return [f"{results} is missing, broken or of another version of kd; `kd report` makes it again."]
    if undecided.keys() != config.experiments.keys():
        return [f"All results are here, but {folder} is of other runs; `kd report` makes it of these."]
    lines = [f"All results are here: the table is {folder / 'results.md'}, every response in {folder / 'index.html'}."]
    if open_runs := [name for name, count in undecided.items() if count]:
        count = sum(undecided.values())
        lines.append(
            f"No rule settles {count} responses; `kd review {open_runs[0]}` decides by hand ({_listed(open_runs)})."
        )
    if PIPELINE.exists():
        newer = PARAMS.stat().st_mtime > results.stat().st_mtime
        lines.append(
            f"{'params.yaml was written after the report; ' if newer else ''}`dvc status` says what is out of date, "
            f"`{_session(config)}` makes that again."
        )
    if not (config.artifacts / "attention").exists():
        lines.append("Not in the table, and not made: how the students attend, `kd attention`.")
    return [*lines, "Next: `kd publish crate results.zip` packs all this for an archive."]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
