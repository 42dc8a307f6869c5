"""The package as others cite it: CITATION.cff by the rules of its format, and one version wherever one stands."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from typing import Literal

import pytest
from conftest import REPOSITORY
from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

from kd.machine.version import read_version


class Cff(BaseModel):
    """A mapping of the Citation File Format 1.2.0, which knows no other keys than its own."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Person(Cff):
    given: str = Field(alias="given-names", min_length=1)
    family: str = Field(alias="family-names", min_length=1)


class Entity(Cff):
    name: str = Field(min_length=1)


class Identifier(Cff):
    type: Literal["doi", "url", "swh", "other"]
    value: str = Field(min_length=1)
    description: str = Field(default="-", min_length=1)


class Reference(Cff):
    type: Literal["article", "software", "data"]
    title: str = Field(min_length=1)
    authors: list[Person | Entity] = Field(min_length=1)
    year: int
    identifiers: list[Identifier] = Field(min_length=1)


class Citation(Cff):
    """The keys that ours has of those that the format knows; those without a default it asks for."""

    version_of_format: Literal["1.2.0"] = Field(alias="cff-version")
    message: str = Field(min_length=1)
    title: str = Field(min_length=1)
    authors: list[Person | Entity] = Field(min_length=1)
    type: Literal["software", "dataset"] = "software"
    abstract: str = Field(min_length=1)
    keywords: list[str] = Field(min_length=1)
    version: str = Field(min_length=1)
    released: str = Field(alias="date-released", pattern=r"^\d{4}-\d{2}-\d{2}$")
    license: Literal["MIT"]
    references: list[Reference] = Field(min_length=1)


@pytest.fixture(scope="module")
def citation() -> Citation:
    return Citation.model_validate(YAML(typ="safe").load(REPOSITORY / "CITATION.cff"))


def test_the_citation_is_of_the_format_and_names_the_paper(citation: Citation) -> None:
    assert date.fromisoformat(citation.released) >= date(2026, 11, 27)
    (paper,) = citation.references
    assert [one.value for one in paper.identifiers] == ["arXiv:2412.17846"]
    assert all(isinstance(author, Person) for author in paper.authors)


def test_one_version_stands_wherever_one_does(citation: Citation) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = re.findall(
        r"^## (\S+) \((\S+)\)$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = {project["version"], citation.version, read_version().version, changes[0][0]}
    if (dockerfile := REPOSITORY / "Dockerfile").exists():  # not in the image
        versions |= set(re.findall(r'image\.version="([^"]+)"', dockerfile.read_text(encoding="utf-8")))
    assert len(versions) == 1, versions
    assert changes[0][1] == citation.released
    assert sorted(changes, reverse=True) == changes
