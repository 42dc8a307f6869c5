"""dvc.lock: what each stage of the pipeline read and made, and whether the results beside it are those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kd.config import Config, read_mapping, validated
from kd.errors import UserError
from kd.machine.stages import stages_of

LOCK = Path("dvc.lock")
PARAMS = "params.yaml"  # as dvc.lock calls it
REPRO = "run `dvc repro`"


class Part(BaseModel):
    """Some keys of a document that others write; the rest of it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Path(Part):
    path: str
    md5: str | None = None


class Stage(Part):
    """A stage as it ran last: its command, the params that it read by their dotted keys, what it read and made."""

    cmd: str
    params: dict[str, dict[str, Any]] = {}
    deps: list[_Path] = []
    outs: list[_Path] = []


class _Lock(Part):
    stages: dict[str, Stage]


def read_stages(config: Config, params: Path) -> list[Stage]:
    """The stages that made the profile's results; a UserError where a result, or a value in `params`, is not what
    dvc.lock has.

    Stages of earlier names stay in dvc.lock, so a result's own is the one that has its checksum. Captures may be
    larger than one wants to read; theirs is the last that is named.
    """
    document = read_mapping(LOCK, "`dvc repro` writes it")
    stages = validated(_Lock, document, str(LOCK), "what `dvc repro` writes").stages.values()
    given = read_mapping(params, "it should be what made the results")
    found = []
    for path in _results(config):
        made = [stage for stage in stages for out in stage.outs if Path(out.path) == path]
        if not path.is_relative_to(config.artifacts / "teacher"):
            md5 = dvc_md5(path)
            made = [stage for stage in made if any(out.md5 == md5 and Path(out.path) == path for out in stage.outs)]
        if not made:
            raise UserError(f"{path}: not what {LOCK} has of it; run `dvc checkout` to have that back, or `dvc repro`")
        for key, value in made[-1].params.get(PARAMS, {}).items():
            if _at(given, key) != value:
                raise UserError(f"{params}: {key}: another value than {path} was made with ({LOCK}); {REPRO}")
        found.append(made[-1])
    return found


def dvc_md5(path: Path) -> str:
    """The checksum that DVC gives a file, or a folder: that of a list of its files with theirs."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    names = sorted(one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file())
    listed = json.dumps([{"md5": dvc_md5(path / name), "relpath": name} for name in names])
    return f"{hashlib.md5(listed.encode()).hexdigest()}.dir"


def _results(config: Config) -> Iterator[Path]:
    """What the pipeline's stages make of these params, as far as it is there."""
    paths = (*(stage.target for stage in stages_of(config)), config.artifacts / "attention")
    return (path for path in paths if path.exists())


def _at(document: Any, key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    for name in key.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document
