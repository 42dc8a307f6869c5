"""`kd publish crate`: a profile's results as one zip for an archive, described as a Workflow Run RO-Crate.

The same results give the same bytes: files are stored, not compressed, in the order of their names, and carry no times.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import IO

from kd.config import Config
from kd.errors import UserError
from kd.io.files import as_json, sha256, whole_file
from kd.io.progress import progress
from kd.io.text import read_text
from kd.machine.record import FOLDER
from kd.publish.agreement import publishable_results, refuse_published
from kd.publish.contents import contents
from kd.publish.description import METADATA, PREVIEW, Packed, description
from kd.publish.lock import REPRO
from kd.publish.preview import preview
from kd.publish.records import Publication, Record, read_citation, read_records

SUFFIX = ".zip"
CHUNK = 2**20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can say
SHOWN_BYTES = 2**30  # more than a few seconds' writing is shown


def make_crate(config: Config, params: Path, target: Path, *, stores: bool) -> str:
    """Write the crate of what `params`, read as `config`, made to `target`; returns a line about it."""
    if target.suffix != SUFFIX:
        raise UserError(f"{target}: a crate is a zip file; give it a name that ends in {SUFFIX}")
    if target.absolute().is_relative_to(config.artifacts.absolute()):
        raise UserError(
            f"{target}: lies among the results and would change them; name a place outside {config.artifacts}"
        )
    results, stages = publishable_results(config, params)
    records = read_records(config, stages)
    publication = Publication(config, results, read_citation(), records, _date(config, records))
    files = contents(config, params, records, stores=stores)
    if stores:
        captures = config.artifacts / "teacher"
        size = sum(path.stat().st_size for path in files.values() if path.is_relative_to(captures))
        print(f"kd: captures are {size / 1e6:.1f} MB of {target}", file=sys.stderr)
    chart = read_text(config.artifacts / "report" / "accuracy.svg", REPRO)
    with whole_file(target) as work:
        with zipfile.ZipFile(work, "w", zipfile.ZIP_STORED) as archive:
            packed = list(_pack_files(archive, files))
            page = preview(publication, packed, chart)
            shown = _pack(archive, PREVIEW, BytesIO(page.encode()), len(page.encode()))
            document = as_json(description(publication, packed, shown)).encode()
            _pack(archive, METADATA, BytesIO(document), len(document))
        digest, total = sha256(work), work.stat().st_size
    return f"{target}: {len(packed) + 2} files, {total:,} bytes, SHA-256 {digest}"


def _date(config: Config, records: Iterable[Record]) -> datetime:
    """When the results were complete, by the report's record."""
    file = config.artifacts / FOLDER / "report.json"
    for record in records:
        if record.file == file:
            return record.made.ended
    raise UserError(f"{file}: no such file, so it is not known when the results were made; run `kd report`")


def _pack_files(archive: zipfile.ZipFile, files: dict[str, Path]) -> Iterator[Packed]:
    """Write files under their names; each is refused where it is one of the paper's."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with shown("crate", sum(sizes.values())) as advance:
        for name, path in files.items():
            with path.open("rb") as file:
                packed = _pack(archive, name, file, sizes[name])
            refuse_published(path, packed.sha256)
            advance(packed.size)
            yield packed


@contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how far work on `total` bytes is, where that takes a while; the block calls it with the bytes done."""
    if total <= SHOWN_BYTES:
        yield lambda _: None
        return
    with progress((), what, "B", total, scale=True) as bar:
        yield bar.update


def _pack(archive: zipfile.ZipFile, name: str, file: IO[bytes], size: int) -> Packed:
    """Write a file of about that size, and take its checksum on the way."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, size
    digest, written = hashlib.sha256(), 0
    with archive.open(info, "w") as out:
        while chunk := file.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
            written += len(chunk)
    return Packed(name, written, digest.hexdigest())
