"""The README's picture: the accuracies of two runs that differ in their protocol, side by side, as one SVG.

    python -m kd.report.readme RESULTS RESULTS docs/mini.svg

The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.io.files import read_json, whole_file, write_text
from kd.report.charts import Chart, protocol_chart, standalone, svg

KEYS = {"profile", "protocol", "control", "experiments", "differs_from_paper"}
HEADINGS = {"aligned": "As the method says (aligned)", "published": "As the paper did it (published)"}


def picture(documents: Sequence[dict[str, Any]]) -> Chart:
    """The chart of results documents, one for each protocol, whose experiments have the same names."""
    names = list(documents[0]["experiments"])
    for document in documents[1:]:
        if set(document["experiments"]) != set(names):
            raise UserError(
                f"profiles {documents[0]['profile']} and {document['profile']} have other experiments: "
                "give the results of profiles with the same rows"
            )
    panels = {HEADINGS[document["protocol"]]: document for document in documents}
    if len(panels) < len(documents):
        raise UserError(f"both results are of protocol {documents[0]['protocol']}: give one of each")
    return protocol_chart(panels, _called(documents[0]))


def _called(document: dict[str, Any]) -> dict[str, str]:
    """What each experiment is called in the picture: the control first, then others that are not trained."""
    experiments, control = document["experiments"], document["control"]
    ordered = sorted(experiments, key=lambda name: (name != control, experiments[name]["trained"]))

    def called(name: str) -> str:
        one = experiments[name]
        if one["trained"]:
            return name
        if name == control:
            return "untrained, asked\nthe same way"
        against = one["against_control"]
        return f"untrained\n({name})" if against is None or against["asked_alike"] else "untrained, asked\nanother way"

    return {name: called(name) for name in ordered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw it; 0 when done, 2 where the results do not go together."""
    parser = argparse.ArgumentParser(prog="python -m kd.report.readme", description="Draw the README's picture.")
    parser.add_argument("results", nargs=2, type=Path, help="results.json of two runs, one for each protocol")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    options = parser.parse_args(arguments)
    try:
        chart = picture([_read(path) for path in options.results])
        with whole_file(options.picture) as work:
            write_text(work, standalone(chart, svg(chart)) + "\n")
    except UserError as error:
        print(f"kd: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path, "what `kd report` writes")
    if not (isinstance(document, dict) and document.keys() >= KEYS):
        raise UserError(f"{path}: not a results.json of `kd report`; run it again")
    return document


if __name__ == "__main__":
    raise SystemExit(main())
