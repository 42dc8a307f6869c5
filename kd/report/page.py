"""A report as one HTML file that needs nothing else: tables, charts, and an explorer of every response.

It works from a disk, without a network. Its content security policy lets run the style and the script below, known by
their checksums, and nothing else: no request leaves the page. What a model wrote reaches it compressed, as data, and
is shown as text (page.js makes no markup of it).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from kd.report.charts import Chart

_NUMERIC = re.compile(r"[-+]?[0-9](?:[.,]?[0-9])*+%?(?:[ /]|\Z)")


@dataclass(frozen=True)
class Section:
    """A heading, and below it HTML that holds no unescaped text of others."""

    title: str
    html: str


def page(
    title: str,
    setting: str,
    opening: Sequence[str],
    results: Sequence[Section],
    charts: Sequence[tuple[Chart, str]],
    packed: str,
    provenance: Sequence[Section],
) -> str:
    """The whole file: `charts` with their SVG, `packed` as `explorer.pack` gives it.

    It opens with the first chart and what it shows, `opening`, a sentence or two.
    """
    first, *others = charts
    style, script = _asset("page.css"), _asset("page.js")
    parts = {
        "title": escape(title),
        "setting": escape(setting),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "finding": "".join(map(paragraph, opening)) + _figure(*first),
        "results": _sections(results),
        "charts": "".join(_figure(chart, drawn) for chart, drawn in others),
        "provenance": _sections(provenance),
        "packed": packed,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _asset("page.html"))


def table(rows: Sequence[tuple[str, ...]], caption: str) -> str:
    """An HTML table, the first row its header; columns of numbers are set flush right."""
    header, *body = rows
    numeric = [any(_NUMERIC.match(row[i]) for row in body) for i in range(len(header))]
    numeric[0] = False  # names, or files

    def cells(row: tuple[str, ...], tag: str, scope: str) -> str:
        return "".join(
            f"<{tag if i else 'th'}{scope if i == 0 or tag == 'th' else ''}{' class=num' if numeric[i] else ''}>"
            f"{escape(cell)}</{tag if i else 'th'}>"
            for i, cell in enumerate(row)
        )

    lines = "".join(f"<tr>{cells(row, 'td', ' scope=row')}</tr>\n" for row in body)
    return (
        f"<p class=caption>{escape(caption)}</p>\n"
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{cells(header, 'th', ' scope=col')}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def folded(summary: str, html: str) -> str:
    """HTML that is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{html}</details>\n"


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>\n"


def listing(texts: Sequence[str]) -> str:
    """Plain texts as a list; nothing where there are none."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul class=notes>\n{items}</ul>\n" if items else ""


def _sections(sections: Sequence[Section]) -> str:
    return "".join(f"<div class=part><h3>{escape(section.title)}</h3>\n{section.html}</div>\n" for section in sections)


def _figure(chart: Chart, drawn: str) -> str:
    return (
        f"<figure id=chart-{chart.name}><h3>{escape(chart.title)}</h3>\n{drawn}\n"
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>\n"
    )


def _asset(name: str) -> str:
    return files("kd.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source for the content security policy: the checksum of an element's text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
