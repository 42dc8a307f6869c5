"""A study that a CPU runs in a minute: studies/priming with a few conditions, a handful of rows and a tiny Llama."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
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


def kd_study(*arguments: str) -> subprocess.Popen[str]:
    """`kd study`, on the CPU: what is tested is the engine, which starts many processes."""
    command = [sys.executable, "-m", "kd", "study", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_to_end(*arguments: str) -> tuple[int, str]:
    process = kd_study(*arguments)
    _, said = process.communicate(timeout=300)
    return process.returncode, said
