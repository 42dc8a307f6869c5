"""`kd publish verify`: whether a crate is what it says, on whatever machine: every file by size and checksum, nothing
beside them, and the table computed again from the crate's logs."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from kd.config import load_config
from kd.errors import UserError, WorkFailedError
from kd.io.files import full_disk
from kd.io.text import decode, parse_json, refuse_folder
from kd.publish.agreement import agreed_results
from kd.publish.crate import CHUNK, shown
from kd.publish.description import METADATA, WEIGHTS, Packed
from kd.publish.lock import PARAMS

AGAIN = "fetch it again"
# No way out of a folder (no "..", no root, no drive), and no longer than every system takes.
NAME = re.compile(r"(?=.{1,240}\Z)[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
METADATA_BYTES = 64 * 2**20  # that of the paper's profile has less than one
SWELLING = 100  # times a zip's own size: more than any text of ours can be compressed, less than a bomb is
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1
# What zipfile raises, here and there, on bytes that are not those of a zip.
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)


def verify(file: Path) -> str:
    """A line that says what holds of the crate in `file`; a UserError names what does not."""
    with _opened(file) as archive, _room() as work:
        members = _members(file, archive)
        described = _described(file, archive, members)
        _compare_names(file, set(members) - {METADATA}, {one.name for one in described})
        total = sum(one.size for one in described)
        with shown("verify", total) as advance:
            for one in described:
                _check(file, archive, members[one.name], one, work)
                advance(one.size)
        profile, rows = _check_table(file, work)
    return (
        f"{file}: holds: {len(described)} files, {total:,} bytes, by size and SHA-256 and none beside them; the table "
        f"of profile {profile}, {rows} rows, comes out of its logs again"
    )


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    refuse_folder(file)
    if not file.exists():
        raise UserError(f"{file}: no such file; `kd publish crate` makes one")
    if not file.is_file():  # which may have no end
        raise UserError(f"{file}: a pipe or a device, where a crate is a file; save it as one")
    try:
        archive = zipfile.ZipFile(file)
    except BROKEN as error:
        raise UserError(f"{file}: no zip file, or cut ({error}); {AGAIN}") from None
    with archive:
        yield archive


@contextmanager
def _room() -> Iterator[Path]:
    """A folder to unpack into, while the block lasts."""
    with TemporaryDirectory(prefix="kd-") as work:
        try:
            yield Path(work)
        except OSError as error:
            if not full_disk(error):
                raise
            raise WorkFailedError(
                f"{work}: no room to unpack a crate; make room on that disk, or set TMPDIR to a folder on another"
            ) from None


def _members(file: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in the zip by name, each of a kind that may be unpacked; folders, which a zip need not name, are passed
    over."""
    infos = [info for info in archive.infolist() if not (info.is_dir() and info.file_size == 0)]
    for info in infos:
        if not NAME.fullmatch(info.filename):
            raise UserError(f"{file}: {info.filename!r} is no name of a file within a crate; trust nothing of it")
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise UserError(f"{file}: {info.filename} is a link or a device, which no crate has; trust nothing of it")
        if info.header_offset < 0:  # zipfile would seek there
            raise UserError(f"{file}: {info.filename} is damaged (it begins before the zip does); {AGAIN}")
        if info.compress_type not in METHODS or info.flag_bits & ENCRYPTED:
            raise UserError(f"{file}: {info.filename} is packed in a way that no crate is; {AGAIN}")
    members = {info.filename: info for info in infos}
    if len(members) < len(infos):
        names = [info.filename for info in infos]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: {twice} is in it twice; trust nothing of it")
    for name in members:
        if inner := next((str(folder) for folder in PurePosixPath(name).parents if str(folder) in members), None):
            raise UserError(f"{file}: {inner} is in it as a file and as a folder; trust nothing of it")
    if sum(info.file_size for info in infos) > SWELLING * file.stat().st_size:
        raise UserError(f"{file}: unpacks to more than {SWELLING} times its size; trust nothing of it")
    return members


def _described(file: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> list[Packed]:
    """The files that the crate's description names, in the order of their names."""
    if METADATA not in members:
        raise UserError(f"{file}: no {METADATA} in it, so no crate; name one that `kd publish crate` made")
    if members[METADATA].file_size > METADATA_BYTES:
        raise UserError(f"{file}: {METADATA} is larger than {METADATA_BYTES:,} bytes; trust nothing of it")
    content = b"".join(_chunks(file, archive, members[METADATA]))
    place = file / METADATA
    try:
        document = parse_json(decode(content, place))
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); {AGAIN}") from None
    graph = document.get("@graph") if isinstance(document, dict) else None
    if not isinstance(graph, list):
        raise UserError(f"{place}: no RO-Crate's description; {AGAIN}")
    found = [_packed(place, entity) for entity in graph if isinstance(entity, dict) and "sha256" in entity]
    return sorted(found, key=lambda one: one.name)


def _packed(place: Path, entity: dict[str, Any]) -> Packed:
    name, size, digest = (entity.get(key) for key in ("@id", "contentSize", "sha256"))
    if not (
        isinstance(name, str)
        and isinstance(size, str)
        and isinstance(digest, str)
        and NAME.fullmatch(name)
        and re.fullmatch("[0-9]{1,15}", size)
        and SHA256.fullmatch(digest)
    ):
        raise UserError(f"{place}: {name!r} has no name, contentSize or sha256 that a file can have; {AGAIN}")
    return Packed(name, int(size), digest)


def _compare_names(file: Path, there: set[str], described: set[str]) -> None:
    for name in sorted(described - there):
        raise UserError(f"{file}: {name} is missing, which {METADATA} names; {AGAIN}")
    for name in sorted(there - described):
        raise UserError(f"{file}: {name} is in it, but not in {METADATA}; trust nothing of it")


def _check(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, one: Packed, work: Path) -> None:
    """Compare a file with its description, and unpack it into `work` unless it holds weights or states, which the table
    is not made of."""
    if info.file_size != one.size:
        raise UserError(f"{file}: {one.name} has {info.file_size:,} bytes, not {one.size:,} as described; {AGAIN}")
    digest = hashlib.sha256()
    target = None if PurePosixPath(one.name).suffix in WEIGHTS else work / one.name
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") if target else nullcontext() as out:
        for chunk in _chunks(file, archive, info):
            digest.update(chunk)
            if out:
                out.write(chunk)
    if digest.hexdigest() != one.sha256:
        raise UserError(f"{file}: {one.name} is not the file that {METADATA} describes, by its SHA-256; {AGAIN}")


def _chunks(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """A file's bytes, no more than the zip says it has."""
    try:
        with archive.open(info) as member:
            while chunk := member.read(CHUNK):
                yield chunk
    except BROKEN as error:
        raise UserError(f"{file}: {info.filename} is damaged ({error}); {AGAIN}") from None


def _check_table(file: Path, work: Path) -> tuple[str, int]:
    """The profile, and how many rows its table has; a UserError where its logs come to another table."""
    try:
        with chdir(work):
            config = load_config(Path(PARAMS))
            results = agreed_results(
                config, "they were changed before they were packed, or another version of kd counted them"
            )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config.profile, len(results["experiments"])
