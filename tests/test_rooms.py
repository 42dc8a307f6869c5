"""The house: rooms import what lies below them and nothing above, and what needs no torch does not stand behind it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

KD = REPOSITORY / "kd"
# From below; rooms on one line do not know each other. Modules at the top of kd/ are rooms of their own.
FLOORS = [
    "errors",
    "io paper kernels",
    "config",
    "fingerprint",
    "data models",
    "store scoring",
    "protocol",
    "teacher",
    "distill assess",
    "analysis",
    "report",
    "inputs machine completion",
    "study audit",
    "publish",
    "cli",
    "__main__",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kd":
            below = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found |= set(below)
    return found


def room(path: Path) -> str:
    return path.relative_to(KD).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(KD.rglob("*.py")), ids=lambda path: path.relative_to(KD).as_posix())
def test_no_import_goes_up(path: Path) -> None:
    if path.parent == KD and path.name == "__init__.py":
        return
    own = room(path)
    for other in imports(path) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{own} imports {other}"


@pytest.mark.parametrize("module", ["kd.cli", "kd.scoring.log", "kd.scoring.significance", "kd.audit.run", "kd.inputs"])
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in KD.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR)
