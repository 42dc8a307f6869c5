"""Figures in a document, each bound by name to a value in results.

Behind a figure stands its key and its form in a comment, which no page shows: `29.6%<!-- mini.accuracy:.1% -->`. `fill`
writes every such figure anew, so a document is right where `fill` leaves it as it is. `unbound` finds figures without a
key; those that are no results are named once in the document: `<!-- given: 405B, 8B -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kd.errors import UserError

GIVEN = "given: "
POINTS = "p"  # a form of ours: percentage points
_BOUND = re.compile(r"(?P<figure>[+-]?[\w.,]+(?:e-\d+)?%?|\?)<!-- (?P<key>[^:<>]+):(?P<form>[^ <>]*) -->")
_GIVEN = re.compile(rf"<!-- {GIVEN}(.*?) -->", re.DOTALL)
# What holds names, commands and values that are others' to check, and the numbers of a list.
_APART = re.compile(
    r"<!-- table: .*?<!-- end of table -->|<!--.*?-->|```.*?```|`[^`]*`|\]\([^)]*\)|^ {4}[^\n]*|^ *\d+\. ",
    re.DOTALL | re.MULTILINE,
)
_FIGURE = re.compile(r"(?<![\w.-])[+-]?\d[\w.,]*(?:-\w+)*(?: ?%)?")


def fill(document: str, results: Mapping[str, Any], where: str) -> str:
    """The document with each bound figure as `results` has it; a UserError names a key that is not there."""

    def figure(found: re.Match[str]) -> str:
        key, form = found["key"], found["form"]
        return f"{_form(_value(results, key, where), form, f'{where}: {key}')}<!-- {key}:{form} -->"

    return _BOUND.sub(figure, document)


def unbound(document: str) -> list[str]:
    """The figures in a document's text that are neither bound to a key nor named as given."""
    given = {name.strip() for names in _GIVEN.findall(document) for name in names.split(",")}
    text = _APART.sub(" ", _BOUND.sub(" ", document))
    found = (match[0].rstrip(".,") for match in _FIGURE.finditer(text))
    return [figure for figure in found if figure not in given]


def _value(results: Any, key: str, where: str) -> Any:
    """What lies under a key: names with dots between, and places in lists, from 0."""
    value = results
    for name in key.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{where}: {key}: the results have no {name!r} there; mend the key") from None
    return value


def _form(value: Any, form: str, where: str) -> str:
    try:
        return format(100 * value, f"{form[:-1]}f") if form.endswith(POINTS) else format(value, form)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {form!r} is no form of {value!r} ({error}); .1% and .2f are some") from None
