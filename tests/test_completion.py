"""What a shell offers behind `kd`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

from kd.completion import names
from kd.config import Config

HEAVY = {"torch", "transformers", "numpy", "scipy", "dvc"}
# What bash does at the TAB key, once it knows of kd.
TAB = """\
eval "$(register-python-argcomplete kd)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete kd
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A folder with the miniature's params, of two students, an untrained row and two seeds."""
    monkeypatch.chdir(tmp_path)
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles/mini.yaml")
    keep(params, "fine-tuning", "base-kd", "no-distillation")
    params["seeds"] = [1, 2]
    YAML().dump(params, Path("params.yaml"))
    return params


RUNS = ["fine-tuning-1", "fine-tuning-2", "base-kd-1", "base-kd-2"]


@pytest.mark.parametrize(
    ("command", "argument", "expected"),
    [
        ("teacher", "prompt", ["base"]),
        ("train", "student", ["fine-tuning", "base-kd", *RUNS]),
        ("search", "student", ["base-kd"]),
        ("assess", "student", ["no-distillation", "fine-tuning", "base-kd", *RUNS]),
        ("measure", "student", ["no-distillation", "fine-tuning", "base-kd", *RUNS]),
        ("review", "run_name", ["no-distillation", *RUNS]),
    ],
)
def test_names_are_those_of_params(command: str, argument: str, expected: list[str], params: dict[str, Any]) -> None:
    assert list(names(Config.model_validate(params), command, argument)) == expected


def tab(line: str) -> list[str]:
    """What bash offers behind a line."""
    command = ["bash", "--norc", "-c", TAB, "bash", line]
    variables = environment() | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.splitlines()]


@pytest.mark.usefixtures("params")
def test_bash_completes_commands_names_options_and_files() -> None:
    assert tab("kd tr") == ["train"]
    assert tab("kd train ba") == ["base-kd", "base-kd-1", "base-kd-2"]
    assert tab("kd doctor --js") == ["--json"]
    assert tab("kd extract para") == ["params.yaml"]
    Path("params.yaml").rename("mine.yaml")
    assert tab("kd teacher ") == [""]  # nothing is known here
    assert tab("kd teacher --params mine.yaml ") == ["base"]


@pytest.mark.usefixtures("params")
def test_nothing_heavy_is_waited_for(tmp_path: Path) -> None:
    line, out = "kd train ", tmp_path / "out"
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    command = [sys.executable, "-X", "importtime", "-m", "kd.cli"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | variables, check=True)
    assert out.read_text().splitlines()[0] == "fine-tuning"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argcomplete" in imported
    assert not HEAVY & imported
