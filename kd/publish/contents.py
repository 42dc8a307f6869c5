"""What goes into a crate: named file by file, so that nothing else that lies there does.

Never in it: the paper's published logs, which carry no licence, and weights of models, of which the teacher's output
head is a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from kd.audit.logs import SHA256
from kd.config import Config
from kd.errors import UserError
from kd.io.files import sha256
from kd.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.models.weights import read_header, some
from kd.publish.lock import LOCK, PARAMS, REPRO
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
LORA = (".lora_A.weight", ".lora_B.weight")
PAGE = "index.html"


def contents(config: Config, params: Path, records: Iterable[Record], *, stores: bool) -> dict[str, Path]:
    """The files of a crate by their names in it, in order; with `stores` the captures too. A UserError where one is
    missing that has to be there, or where an adapter or a log is not what the report's page was made of."""
    for path in CHECKOUT:
        if not path.is_file():
            raise UserError(f"{path}: no such file; start kd in the package's checkout, where it lies")
    page = config.artifacts / "report" / PAGE
    logs = [log_file(config, run) for run in config.experiments]
    adapters = [file for run in config.adapters for file in _adapter(config, run)]
    _insist_shown(page, [*logs, *(file for file in adapters if file.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))])
    made = [
        *(config.artifacts / "inputs" / f"{of}.json" for of in ("data", "student", "teacher")),
        config.artifacts / "data" / "test.jsonl",
        config.artifacts / "statistics.json",
        *(reviews_file(run) for run in config.experiments),
        *_below(config.artifacts / "report", REPORT_KINDS),
        *_below(config.artifacts / "attention", ATTENTION_KINDS),
        *(record.file for record in records),
        *adapters,
        *logs,
        *(file for prompt in config.prompts if stores for file in store_files(config.artifacts / "teacher" / prompt)),
    ]
    named = {PARAMS: params} | {path.as_posix(): path for path in (*CHECKOUT, *made) if path.is_file()}
    return dict(sorted(named.items()))


def store_files(folder: Path) -> list[Path]:
    """A capture's manifest and the shards that it names."""
    manifest = TeacherStore(folder).manifest
    return [folder / MANIFEST, *(shard_file(folder, manifest.kind, i) for i in range(len(manifest.shards)))]


def refuse_published(path: Path, digest: str) -> None:
    """Refuse a file that is one of the paper's, whatever it is called here."""
    for name, published in SHA256.items():
        if digest == published:
            raise UserError(
                f"{path}: the paper's {name}, which carries no licence and may not be passed on; move it away"
            )


def _adapter(config: Config, run: str) -> Iterator[Path]:
    folder = config.artifacts / "adapters" / run
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; run `kd train {run}`")
    weights, again = folder / ADAPTER_WEIGHTS, f"run `kd train {run}` again"
    if others := [name for name in read_header(weights, again).tensors if not name.endswith(LORA)]:
        raise UserError(f"{weights}: {some(others)} not of a LoRA adapter, and a model's weights stay out; {again}")
    yield from (folder / name for name in ("README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECK))
    yield from _below(folder / "loss", LOSS_KINDS)


def _below(folder: Path, kinds: set[str]) -> list[Path]:
    """The files of some kinds in a folder and its folders."""
    return sorted(path for path in folder.rglob("*") if path.suffix in kinds)


def _insist_shown(page: Path, files: Iterable[Path]) -> None:
    """Refuse files that the report's page, which lists what it was made of, does not have by these checksums."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for path in files:
        if sha256(path) not in text:
            raise UserError(f"{path}: not what {page} was made of; {REPRO}")
