"""What a checkout says of its results beside dvc.lock: the records of runs, and CITATION.cff."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, Field

from kd.config import Config, read_mapping, validated
from kd.errors import UserError
from kd.io.files import read_json
from kd.machine.record import FOLDER
from kd.machine.stages import stages_of
from kd.publish.lock import Part, Stage

CITATION = Path("CITATION.cff")
MOVE = "move it away, or make its result again"
ATTENTION = "kd attention"  # a stage that the table does not wait for


class Made(Part):
    """A record (kd/machine/record.py) of how a result was made."""

    command: str
    began: AwareDatetime
    ended: AwareDatetime
    cores: int
    gpus: list[str]
    commit: str | None
    changed: bool
    versions: dict[str, str]


@dataclass(frozen=True)
class Record:
    """A run of one command of kd: the file that records it, what it says, and which paths dvc.lock has as read and
    made by it (none where it is no stage of its own)."""

    file: Path
    made: Made
    reads: list[str]
    makes: list[str]

    @property
    def tool(self) -> str:
        """The command without what it was run for: `kd train`."""
        return " ".join(self.made.command.split()[:2])


class Author(Part):
    """One of CITATION.cff's authors, a person or an organisation."""

    name: str | None = None
    given: str | None = Field(default=None, alias="given-names")
    family: str | None = Field(default=None, alias="family-names")
    orcid: str | None = None
    affiliation: str | None = None

    @property
    def called(self) -> str:
        """The name as it is written."""
        return self.name or " ".join(filter(None, (self.given, self.family)))


class _Identifier(Part):
    value: str


class Reference(Part):
    """A work that the package builds on."""

    title: str
    authors: tuple[Author, ...] = ()
    identifiers: tuple[_Identifier, ...] = ()


class Citation(Part):
    """Who made the package and how it is licensed."""

    title: str
    license: str
    authors: list[Author] = Field(min_length=1)
    references: tuple[Reference, ...] = ()
    repository: str | None = Field(default=None, alias="repository-code")
    url: str | None = None


@dataclass(frozen=True)
class Publication:
    """A profile's results, results.json and what its records say, with who made the package; `date` is when the results
    were complete."""

    config: Config
    results: dict[str, Any]
    citation: Citation
    records: list[Record]
    date: datetime


def read_records(config: Config, stages: Iterable[Stage]) -> list[Record]:
    """The records of this profile's results, in the order in which those were begun."""
    by_command = {stage.cmd.removeprefix("python -m "): stage for stage in stages}
    known = {stage.command for stage in stages_of(config)} | {ATTENTION}
    found = []
    for file in sorted((config.artifacts / FOLDER).rglob("*.json")):
        command = _command(config, file)
        if command not in known:  # of an earlier seed or prompt, or none of the pipeline's
            continue
        made, stage = read_made(file), by_command.get(command)
        reads, makes = ([one.path for one in paths] for paths in ((stage.deps, stage.outs) if stage else ((), ())))
        found.append(Record(file, made, reads, makes))
    return sorted(found, key=lambda record: (record.made.began, str(record.file)))


def read_made(file: Path) -> Made:
    """One record."""
    document = read_json(file, "the record of a run", MOVE)
    if not isinstance(document, dict):
        raise UserError(f"{file}: not the record of a run; {MOVE}")
    return validated(Made, document, str(file), "another record beside it")


def read_citation() -> Citation:
    """CITATION.cff."""
    document = read_mapping(CITATION, "it comes with the package")
    return validated(Citation, document, str(CITATION), "the Citation File Format")


def _command(config: Config, file: Path) -> str:
    """The command that a file records, such as `kd train base-kd-1`; of several processes each adds its rank."""
    name = file.relative_to(config.artifacts / FOLDER).with_suffix("")
    name = name.with_suffix("") if name.suffix[1:].isdecimal() else name
    return " ".join(("kd", *name.parts))
