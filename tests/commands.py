"""`kd` as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import environment


def begin(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`kd`, begun, with more variables in its environment."""
    command = [sys.executable, "-m", "kd.cli", *arguments]
    return subprocess.Popen(command, env=environment() | variables, stderr=subprocess.PIPE, encoding="utf-8")


def run(*arguments: str, **variables: str) -> None:
    """`kd`, to its end, which must be a good one."""
    process = begin(*arguments, **variables)
    _, said = process.communicate()
    assert process.returncode == 0, said


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished(top: Path = Path("artifacts")) -> list[Path]:
    """Every folder and file of unfinished work, and of its locks."""
    return sorted(path for partial in top.rglob(".partial") for path in (partial, *partial.rglob("*")))
