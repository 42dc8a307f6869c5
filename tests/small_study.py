"""A study that a CPU runs in a minute: studies/priming with a few conditions, a handful of rows and a tiny Llama."""

from __future__ import annotations

from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from forked import SAID, begin, status
from ruamel.yaml import YAML

PRIMING = REPOSITORY / "studies" / "priming" / "study.yaml"
RATE = {"distill.learning_rate": 0.02}


def small_study(llama: Path) -> dict[str, Any]:
    """One trained condition, its students asked again in another way, the untrained student, and two seeds."""
    study: dict[str, Any] = YAML(typ="safe", pure=True).load(PRIMING)
    params = study["params"]
    params["dataset"] |= {"train_rows": 6, "test_rows": 4, "steps": [1]}
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(llama)}
    params["distill"] |= {"cosine_steps": 6, "checkpoint_every": 2}
    params["assess"] |= {"batch_tokens": 512, "max_new_tokens": 4}
    return study | {
        "study": "small",
        "seeds": [1, 2],
        "teachers": {},
        "searches": {},
        "conditions": {
            "untrained": {"students": ["matched"]},
            "rate": {"students": ["fine-tuning", "base-kd"], "params": RATE},
            "stopped": {"students": ["base-kd"], "trained_in": "rate", "params": {"assess.stop": ["####"]}},
        },
        "questions": {
            "training": {
                "question": "Does training help?",
                "pairs": [["rate/base-kd", "untrained/matched"], ["rate/base-kd", "rate/fine-tuning"]],
            }
        },
    }


def write_study(folder: Path, study: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    YAML().dump(study, folder / "study.yaml")


def kd_study(command: str, folder: Path, *options: str) -> BaseProcess:
    """`kd study`, begun, on the CPU: what is tested is the engine, which starts many processes. What it says is
    added to a file in the study's folder."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return begin("study", command, str(folder), *options, said=folder / SAID, **variables)


def run_to_end(command: str, folder: Path, *options: str) -> tuple[int, str]:
    """The exit status of `kd study` and what it said."""
    ended = status(kd_study(command, folder, *options), 300)
    return ended, (folder / SAID).read_text()
