"""Which files are published: named one by one, so that nothing else that lies there goes along.

Never among them: the paper's published logs, which carry no licence, and weights of models, of which the teacher's
output head is a part.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kd.config import Config, FolderDataset, FolderModel
from kd.errors import UserError
from kd.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.publish.lock import LOCK, PARAMS
from kd.publish.records import CITATION, Record
from kd.report.reading import CHECK
from kd.scoring.log import log_file
from kd.scoring.review import reviews_file
from kd.store.reader import TeacherStore
from kd.store.records import MANIFEST
from kd.store.shards import shard_file

WORKFLOW = Path("dvc.yaml")
CHECKOUT = (CITATION, LOCK, WORKFLOW, Path("LICENSE"), Path("NOTICE"), Path("requirements.lock"))
REPORT_KINDS = {".html", ".json", ".md", ".png", ".svg", ".tsv"}
ATTENTION_KINDS = {".csv", ".png", ".svg"}
LOSS_KINDS = {".json", ".tsv"}
CARD = "README.md"


def contents(config: Config, params: Path, records: Iterable[Record], *, stores: bool) -> dict[str, Path]:
    """The files of a crate by their names in it, in order; with `stores` the captures too. A UserError where one of the
    checkout's is missing."""
    for path in CHECKOUT:
        if not path.is_file():
            raise UserError(f"{path}: no such file; start kd in the package's checkout, where it lies")
    made = [
        *(config.artifacts / "inputs" / f"{of}.json" for of in ("data", "student", "teacher")),
        config.artifacts / "data" / "test.jsonl",
        config.artifacts / "statistics.json",
        *(reviews_file(run) for run in config.experiments),
        *report_files(config),
        *_below(config.artifacts / "attention", ATTENTION_KINDS),
        *(record.file for record in records),
        *(file for run in config.adapters for file in _adapter_files(config.artifacts / "adapters" / run)),
        *(log_file(config, run) for run in config.experiments),
        *(file for prompt in config.prompts if stores for file in _store_files(config.artifacts / "teacher" / prompt)),
    ]
    named = {PARAMS: params} | {path.as_posix(): path for path in (*CHECKOUT, *made) if path.is_file()}
    return dict(sorted(named.items()))


def report_files(config: Config) -> list[Path]:
    """The report's tables, charts and page."""
    return _below(config.artifacts / "report", REPORT_KINDS)


def folders(config: Config) -> list[str]:
    """The folders of this machine that stand in the results and on the page, by key."""
    named = {
        "dataset.path": config.dataset,
        "teacher.model.path": config.teacher.model,
        "student.model.path": config.student.model,
    }
    return [f"{key} {one.path}" for key, one in named.items() if isinstance(one, FolderDataset | FolderModel)]


def _adapter_files(folder: Path) -> list[Path]:
    """An adapter with what training leaves beside it."""
    named = [folder / name for name in (CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECK)]
    return [*named, *_below(folder / "loss", LOSS_KINDS)]


def _store_files(folder: Path) -> list[Path]:
    """A capture's manifest and the shards that it names."""
    manifest = TeacherStore(folder).manifest
    return [folder / MANIFEST, *(shard_file(folder, manifest.kind, i) for i in range(len(manifest.shards)))]


def _below(folder: Path, kinds: set[str]) -> list[Path]:
    """The files of some kinds in a folder and its folders."""
    return sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
