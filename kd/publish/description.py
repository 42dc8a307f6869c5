"""What a crate says of itself, ro-crate-metadata.json: a Provenance Run Crate, the fullest of the Workflow Run RO-Crate
profiles (https://w3id.org/ro/wfrun/provenance/0.5), on RO-Crate 1.1.

The workflow is dvc.yaml, its tools are kd's commands at the commits that ran, and each record of a run is an action
with what dvc.lock has as read and made by it, as far as that is in the crate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from rocrate.model import ContextEntity, Dataset, File, Preview
from rocrate.rocrate import ROCrate

from kd.config import Config
from kd.publish.contents import WORKFLOW
from kd.publish.lock import PARAMS
from kd.publish.records import Author, Citation, Publication, Record, Reference
from kd.report.finding import comparability, finding
from kd.report.tables import setting

METADATA, PREVIEW = "ro-crate-metadata.json", "ro-crate-preview.html"
VERSION = "1.1"
CONTEXT = "https://w3id.org/ro/terms/workflow-run/context"
WORKFLOW_CRATE = "https://w3id.org/workflowhub/workflow-ro-crate/1.0"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    WORKFLOW_CRATE: "Workflow RO-Crate",
}
KINDS = {
    ".cff": "application/yaml",
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".lock": "text/plain",
    ".md": "text/markdown",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".tsv": "text/tab-separated-values",
    ".yaml": "application/yaml",
    "": "text/plain",
}
WEIGHTS = {".safetensors"}  # made with a model, whose licence they fall under
ROOT = "./"
# What a file or folder is; {profile} stands for the profile's folder.
SAID = {
    "CITATION.cff": "How to cite the package that made these results",
    "LICENSE": "The licence",
    "NOTICE": "The licences of the models and data behind these results, which are not in the crate",
    "dvc.lock": "What each stage of the pipeline read and made, by its checksum",
    "dvc.yaml": "The pipeline",
    "params.yaml": "The experiment: everything that shapes the results",
    "requirements.lock": "Every library that the results were to be made with, by version and checksum",
    "reviews/": "Answers that a person took from responses that no rule settles",
    "{profile}/": "The results of the profile",
    "{profile}/adapters/": "The trained students, one adapter each, for the student's model",
    "{profile}/attention/": "How each student attends, and how sure it is of each next token",
    "{profile}/data/": "The test questions",
    "{profile}/inputs/": "Which data and models there were",
    "{profile}/logs/": "What each student answered to every test question, and the answer taken from it",
    "{profile}/report/": "The tables and charts",
    "{profile}/report/index.html": "The report's page: tables, charts and every response",
    "{profile}/report/results.json": "The results",
    "{profile}/report/results.md": "The results as tables",
    "{profile}/runs/": "Where, when and by which code each result was made",
    "{profile}/statistics.json": "How sure the teacher is behind each prompt",
    "{profile}/teacher/": "What the teacher made of the questions behind each prompt, as states of its last layer",
}


@dataclass(frozen=True)
class Packed:
    """A file in a crate: its name there, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


def description(publication: Publication, files: Sequence[Packed], preview: Packed) -> dict[str, Any]:
    """The document. `files` are all in the crate but the preview and this document itself."""
    config, results, citation = publication.config, publication.results, publication.citation
    crate = ROCrate(version=VERSION)
    crate.metadata.extra_contexts.append(CONTEXT)
    crate.metadata["conformsTo"] = [_to(crate.metadata.profile), _to(WORKFLOW_CRATE)]
    crate.add(Preview(crate, properties=_checksums(preview) | {"encodingFormat": KINDS[".html"]}))
    for profile, name in PROFILES.items():
        _add(crate, profile, "CreativeWork", name=name, version=profile.rpartition("/")[2])
    _add_parts(crate, config, files)
    root = crate.root_dataset
    root["conformsTo"] = [_to(profile) for profile in PROFILES]
    root["name"] = f"Results of profile {config.profile}: {citation.title}"
    root["description"] = " ".join((finding(results), comparability(results), setting(results)))
    root["datePublished"] = publication.date.isoformat()
    root["license"] = _add_license(crate, citation)
    root["author"] = _single([_add_author(crate, author) for author in citation.authors])
    if citation.references:
        works = enumerate(citation.references, start=1)
        root["citation"] = _single([_add_reference(crate, number, work) for number, work in works])
    _add_workflow(crate, publication)
    return dict(crate.metadata.generate())


def _add(crate: Any, identifier: str, kind: str, /, **properties: Any) -> Any:
    """An entity that is no file; properties that are None are left out."""
    given = {name: _single(value) for name, value in properties.items() if value is not None}
    return crate.add(ContextEntity(crate, identifier, properties={"@type": kind} | given))


def _single(value: Any) -> Any:
    """A list of one thing as that thing, as RO-Crate has it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _to(identifier: str) -> dict[str, str]:
    return {"@id": identifier}


def _checksums(file: Packed) -> dict[str, str]:
    return {"name": PurePosixPath(file.name).name, "contentSize": str(file.size), "sha256": file.sha256}


def _add_parts(crate: Any, config: Config, files: Iterable[Packed]) -> None:
    """Every file, and every folder with what lies in it."""
    artifacts = config.artifacts.as_posix()
    said = {name.format(profile=artifacts): {"description": text} for name, text in SAID.items()}
    folders: dict[str, dict[str, None]] = {ROOT: {}}
    for file in files:
        path = PurePosixPath(file.name)
        kind = {"encodingFormat": KINDS[path.suffix]} | ({"license": _to("NOTICE")} if path.suffix in WEIGHTS else {})
        crate.add(File(crate, dest_path=file.name, properties=_checksums(file) | kind | said.get(file.name, {})))
        part = file.name
        for parent in path.parents:
            folder = f"{parent}/" if parent.name else ROOT
            folders.setdefault(folder, {})[part] = None
            part = folder
    for folder in sorted(folders.keys() - {ROOT}):
        name = {"name": PurePosixPath(folder).name}
        crate.add(Dataset(crate, dest_path=folder, properties=name | said.get(folder, {})))
    for folder, parts in folders.items():
        crate.get(folder)["hasPart"] = _single([_to(part) for part in sorted(parts)])


def _add_license(crate: Any, citation: Citation) -> Any:
    return _add(
        crate,
        f"https://spdx.org/licenses/{citation.license}",
        "CreativeWork",
        name=citation.license,
        description="Its text is in LICENSE. Models and data keep their own licences: NOTICE.",
    )


def _add_author(crate: Any, author: Author) -> Any:
    kind = "Organization" if author.name else "Person"
    return _add(
        crate,
        author.orcid or f"#{quote(author.called)}",
        kind,
        name=author.called,
        givenName=author.given,
        familyName=author.family,
        affiliation=author.affiliation,
    )


def _add_reference(crate: Any, number: int, reference: Reference) -> Any:
    return _add(
        crate,
        f"#reference-{number}",
        "ScholarlyArticle",
        name=reference.title,
        author=[_add_author(crate, author) for author in reference.authors] or None,
        identifier=[one.value for one in reference.identifiers] or None,
    )


def _add_workflow(crate: Any, publication: Publication) -> None:
    """The pipeline, the commands that it is made of, and each run of one."""
    config, citation, records = publication.config, publication.citation, publication.records
    dvc = _add(crate, "#dvc", "ComputerLanguage", name="DVC pipeline", url="https://dvc.org")
    workflow = crate.get(WORKFLOW.as_posix())
    workflow["programmingLanguage"] = dvc
    workflow.properties()["@type"] = ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
    workflow["name"] = citation.title
    crate.root_dataset["mainEntity"] = workflow
    actions = [_add_action(crate, config, citation, record) for record in records]
    workflow["hasPart"] = [_to(tool) for tool in dict.fromkeys(one["instrument"].id for one in actions)]
    whole = _add(
        crate,
        "#pipeline",
        "CreateAction",
        name=f"The pipeline, profile {config.profile}",
        description="From the first record of a run to the last; stages that are up to date do not run again.",
        instrument=_to(WORKFLOW.as_posix()),
        object=[_to(PARAMS)],
        result=[_to(f"{config.artifacts.as_posix()}/")],
        startTime=min(record.made.began for record in records).isoformat(),
        endTime=max(record.made.ended for record in records).isoformat(),
    )
    crate.root_dataset["mentions"] = [whole, *actions]


def _add_action(crate: Any, config: Config, citation: Citation, record: Record) -> Any:
    """One run of a command, with its inputs and results as far as they are in the crate."""
    made = record.made
    name = record.file.relative_to(config.artifacts / "runs").with_suffix("").as_posix()
    objects = [PARAMS, *_there(crate, record.reads)]
    place = f"{made.cores} cores" + "".join(f", {gpu}" for gpu in made.gpus)
    return _add(
        crate,
        f"#run/{name}",
        "CreateAction",
        name=name,
        description=f"{made.command} (on {place}; {record.file.as_posix()} says more)",
        instrument=_tool(crate, citation, record),
        object=[_to(path) for path in objects],
        result=[_to(path) for path in _there(crate, record.makes)] or [_to(record.file.as_posix())],
        startTime=made.began.isoformat(),
        endTime=made.ended.isoformat(),
    )


def _there(crate: Any, paths: Iterable[str]) -> list[str]:
    """The files and folders among some paths that are in the crate, by their names there."""
    return [entity.id for path in paths if (entity := crate.get(path)) is not None]


def _tool(crate: Any, citation: Citation, record: Record) -> Any:
    """A command of kd at a commit, with the libraries it had."""
    made = record.made
    version = (made.commit or "unknown") + (" with changes" if made.changed else "")
    return _add(
        crate,
        f"#{'-'.join((*record.tool.split(), *version.split()))}",
        "SoftwareApplication",
        name=record.tool,
        softwareVersion=version,
        url=citation.repository or citation.url,
        softwareRequirements=[
            _add(crate, f"#{library}-{found}", "SoftwareApplication", name=library, softwareVersion=found)
            for library, found in made.versions.items()
        ],
    )
