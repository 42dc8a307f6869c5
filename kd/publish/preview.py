"""ro-crate-preview.html: what a crate shows a person, as one page that needs neither network nor script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files as resources
from urllib.parse import quote

from kd.config import Config
from kd.publish.description import METADATA, SAID, Packed
from kd.publish.records import Publication, Record
from kd.report import tables
from kd.report.finding import comparability, finding
from kd.report.page import folded, listing, paragraph, table

ENTRIES = ("report/index.html", "report/results.md", "report/results.json", "logs/", "adapters/", "teacher/", "runs/")
PLAIN = ("params.yaml", "dvc.lock", "requirements.lock", "LICENSE", "NOTICE", METADATA)
PICTURE = "figure img { display: block; width: 100%; height: auto; }\n"


def preview(publication: Publication, files: Sequence[Packed], chart: str) -> str:
    """The page; `chart` is the SVG file of the accuracies."""
    results, citation = publication.results, publication.citation
    style = resources("kd.report").joinpath("page.css").read_text(encoding="utf-8") + PICTURE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    title = f"Results of profile {publication.config.profile}"
    authors = ", ".join(author.called for author in citation.authors)
    made = f"{citation.title}. {authors}, {publication.date:%Y-%m-%d}."
    licence = f"Licence: {citation.license}; models and data keep their own (NOTICE)."
    picture = base64.b64encode(chart.encode()).decode("ascii")
    parts = [
        f'<header class="top"><h1>{escape(title)}</h1>\n',
        paragraph(f"{made} {licence}"),
        paragraph(tables.setting(results)),
        '</header>\n<main>\n<section id="finding">\n<h2>What it shows</h2>\n',
        paragraph(finding(results)),
        paragraph(comparability(results)),
        '<figure id="chart-accuracy">'
        f'<img alt="Accuracy of each experiment" src="data:image/svg+xml;base64,{picture}">'
        "<figcaption>Share of test questions that are right, with its 95 % interval.</figcaption></figure>\n",
        '</section>\n<section id="results">\n<h2>The experiments</h2>\n',
        table(tables.result_rows(results), "Test questions that are right"),
        listing(tables.notes(results)),
        '</section>\n<section id="files">\n<h2>In this crate</h2>\n',
        _entries(publication.config, {file.name for file in files}),
        folded(f"All {len(files)} files", table(_file_rows(files), "Files, by SHA-256")),
        '</section>\n<section id="runs">\n<h2>How it was made</h2>\n',
        table(_run_rows(publication.records), "Runs, in the order in which they began"),
        "<p><code>kd publish verify</code> checks it all again, on any machine with the package.</p>\n",
        "</section>\n</main>\n",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _entries(config: Config, names: set[str]) -> str:
    """Links to what a person looks for, each with what it is."""
    artifacts = config.artifacts.as_posix()
    said = {name.format(profile=artifacts): text for name, text in SAID.items()}
    said[METADATA] = "All of this for programs: an RO-Crate's description"
    rows = []
    for name in (*(f"{artifacts}/{entry}" for entry in ENTRIES), *PLAIN):
        if name in names or name == METADATA or (name.endswith("/") and any(one.startswith(name) for one in names)):
            rows.append(f'<li><a href="{quote(name)}">{escape(name)}</a>: {escape(said[name])}</li>\n')
    return f"<ul>\n{''.join(rows)}</ul>\n"


def _file_rows(files: Iterable[Packed]) -> list[tuple[str, ...]]:
    return [("File", "Bytes", "SHA-256"), *((one.name, f"{one.size:,}", one.sha256) for one in files)]


def _run_rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("Command", "Began", "Seconds", "On", "Commit")]
    for record in records:
        made = record.made
        seconds = (made.ended - made.began).total_seconds()
        commit = (made.commit or "not known")[:12] + (" with changes" if made.changed else "")
        place = ", ".join((f"{made.cores} cores", *made.gpus))
        rows.append((made.command, f"{made.began:%Y-%m-%d %H:%M %Z}", f"{seconds:.0f}", place, commit))
    return rows
