"""Whether results.json is what the logs beside it come to."""

from __future__ import annotations

from typing import Any

from pydantic import FiniteFloat

from kd.config import Config, validated
from kd.errors import UserError
from kd.io.files import as_json, read_json
from kd.io.text import parse_json
from kd.publish.lock import Part
from kd.report.reading import CHECK, read_runs
from kd.report.results import collect
from kd.study.results import disagreements

RESULTS = "results.json"


class _Measured(Part):
    versions: dict[str, str]


class _Checked(_Measured):
    check_loss: FiniteFloat | None


class _Kept(Part):
    """What results take over from other files without a look."""

    statistics: dict[str, _Measured]
    check: dict[str, _Checked]


def agreed_results(config: Config, mend: str) -> dict[str, Any]:
    """The profile's results.json, refused unless the logs and params come to the same now; `mend` says what then."""
    path = config.artifacts / "report" / RESULTS
    results = read_json(path, "the results that `dvc repro` makes", mend)
    _check_kept(config)
    computed = parse_json(as_json(collect(config, read_runs(config))))
    wrong = next(disagreements(results, computed, ""), None)
    if wrong is not None:
        key = wrong.removeprefix(".")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}not what the logs and params come to; {mend}")
    return dict(results)


def _check_kept(config: Config) -> None:
    """Refuse such files where they are not what kd writes; a crate may come from anywhere."""
    statistics = config.artifacts / "statistics.json"
    checks = {run: config.artifacts / "adapters" / run / CHECK for run in config.adapters}
    document = {
        "statistics": read_json(statistics, "what `kd statistics` writes") if statistics.exists() else {},
        "check": {run: read_json(file, "what `kd train` writes") for run, file in checks.items() if file.exists()},
    }
    validated(_Kept, document, str(config.artifacts), "what `kd statistics` and `kd train` write")
