"""Whether a profile's results belong together, which nothing is published without: results.json is what the logs and
params come to, every result is the one that dvc.lock names, and the report's page was made of these logs and adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat

from kd.audit.logs import SHA256
from kd.config import Config, validated
from kd.errors import UserError
from kd.io.files import as_json, read_json, sha256
from kd.io.text import parse_json, read_text
from kd.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.models.weights import read_header, some
from kd.publish.lock import REPRO, Part, Stage, read_stages
from kd.report.reading import CHECK, read_runs
from kd.report.results import collect
from kd.scoring.log import log_file
from kd.study.results import disagreements

RESULTS, PAGE = "results.json", "index.html"  # of the report
LORA = (".lora_A.weight", ".lora_B.weight")


class _Measured(Part):
    versions: dict[str, str]


class _Checked(_Measured):
    check_loss: FiniteFloat | None


class _Kept(Part):
    """What results take over from other files without a look."""

    statistics: dict[str, _Measured]
    check: dict[str, _Checked]


def publishable_results(config: Config, params: Path) -> tuple[dict[str, Any], list[Stage]]:
    """The document of results.json, and the stages of dvc.lock behind the results of `params`, read as `config`.

    A UserError where something is missing, does not belong to the rest or may not be passed on.
    """
    results = agreed_results(config, REPRO)
    adapters = [file for run in config.adapters for file in _adapter(config, run)]
    stages = read_stages(config, params)
    _insist_shown(
        config.artifacts / "report" / PAGE, [*(log_file(config, run) for run in config.experiments), *adapters]
    )
    return results, stages


def agreed_results(config: Config, mend: str) -> dict[str, Any]:
    """The profile's results.json, refused unless the logs and params come to the same now; `mend` says what then."""
    path = config.artifacts / "report" / RESULTS
    results = read_json(path, "what `kd report` writes", mend)
    _check_kept(config)
    computed = parse_json(as_json(collect(config, read_runs(config))))
    wrong = next(disagreements(results, computed, ""), None)
    if wrong is not None:
        key = wrong.removeprefix(".")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}not what the logs and params come to; {mend}")
    return dict(results)


def refuse_published(path: Path, digest: str) -> None:
    """Refuse a file that is one of the paper's, by its SHA-256, whatever it is called here."""
    for name, published in SHA256.items():
        if digest == published:
            raise UserError(
                f"{path}: the paper's {name}, which carries no licence and may not be passed on; move it away"
            )


def _check_kept(config: Config) -> None:
    """Refuse such files where they are not what kd writes; a crate may come from anywhere."""
    statistics = config.artifacts / "statistics.json"
    checks = {run: config.artifacts / "adapters" / run / CHECK for run in config.adapters}
    document = {
        "statistics": read_json(statistics, "what `kd statistics` writes") if statistics.exists() else {},
        "check": {run: read_json(file, "what `kd train` writes") for run, file in checks.items() if file.exists()},
    }
    validated(_Kept, document, str(config.artifacts), "what `kd statistics` and `kd train` write")


def _adapter(config: Config, run: str) -> Iterator[Path]:
    """The two files of an adapter, which holds nothing of a model."""
    folder, again = config.artifacts / "adapters" / run, f"run `kd train {run}` again"
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; run `kd train {run}`")
        yield folder / name
    weights = folder / ADAPTER_WEIGHTS
    if others := [name for name in read_header(weights, again).tensors if not name.endswith(LORA)]:
        raise UserError(f"{weights}: {some(others)} not of a LoRA adapter, and a model's weights stay here; {again}")


def _insist_shown(page: Path, files: Iterable[Path]) -> None:
    """Refuse files that the report's page, which lists what it was made of, does not have by these checksums."""
    text = read_text(page, REPRO)
    for path in files:
        if sha256(path) not in text:
            raise UserError(f"{path}: not what {page} was made of; {REPRO}")
