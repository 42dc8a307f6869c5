"""Whether results.json is what the logs beside it come to."""

from __future__ import annotations

from typing import Any

from kd.config import Config
from kd.errors import UserError
from kd.io.files import as_json, read_json
from kd.io.text import parse_json
from kd.report.reading import read_runs
from kd.report.results import collect
from kd.study.results import disagreements

RESULTS = "results.json"


def agreed_results(config: Config, mend: str) -> dict[str, Any]:
    """The profile's results.json, refused unless the logs and params come to the same now; `mend` says what then."""
    path = config.artifacts / "report" / RESULTS
    results = read_json(path, "what `kd report` writes", mend)
    computed = parse_json(as_json(collect(config, read_runs(config))))
    wrong = next(disagreements(results, computed, ""), None)
    if wrong is not None:
        key = wrong.removeprefix(".")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}not what the logs and params come to; {mend}")
    return dict(results)
