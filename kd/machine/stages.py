"""The pipeline's stages, as params.yaml makes them of dvc.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd.config import Config
from kd.scoring.log import log_file
from kd.store.head import HEAD_FOLDER


@dataclass(frozen=True)
class Stage:
    """A stage: its name as DVC has it, its command, what it makes, and what such results are called together."""

    name: str
    command: str
    target: Path
    kind: str


def stages_of(config: Config) -> Iterator[Stage]:
    """Every stage that the table waits for, each behind those whose results it reads."""
    folder = config.artifacts
    yield Stage("inputs", "kd inputs", folder / "inputs", "inputs")
    yield Stage("prepare", "kd prepare", folder / "data", "data")
    yield Stage("head", "kd head", folder / "teacher" / HEAD_FOLDER, "the teacher's head")
    for prompt in config.prompts:
        yield Stage(f"teacher@{prompt}", f"kd teacher {prompt}", folder / "teacher" / prompt, "captures")
    for run, adapter in config.adapters.items():
        group = "train-control" if adapter.prompt is None else "train"
        yield Stage(f"{group}@{run}", f"kd train {run}", folder / "adapters" / run, "adapters")
    for run, row in config.experiments.items():
        trained = "assess-control" if config.students.get(row.student) is None else "assess"
        group = "assess-untrained" if row.adapter is None else trained
        yield Stage(f"{group}@{run}", f"kd assess {run}", log_file(config, run), "logs")
    yield Stage("statistics", "kd statistics", folder / "statistics.json", "statistics")
    yield Stage("report", "kd report", folder / "report", "report")
