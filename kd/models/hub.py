"""Models of the Hub: found in huggingface_hub's cache, and fetched into it.

The address, the token, the cache with its layout and its locks are the library's, so what any program on this machine
has fetched is found here and the other way round. Only the bytes are moved by this module, because the library's own
`snapshot_download` (0.36) compares sizes instead of checksums, warns of a disk that is too small and goes on, shows a
bar per file, and starts a broken file anew where it fetches through `hf_xet`.

A blob of the cache bears its checksum as its name: the SHA-256 of an LFS file, Git's object id of any other. While it
is fetched it is called `<checksum>.part`, on which a later run builds; it gets its name once its bytes have that
checksum, and a snapshot links to it. Where the file system has no links the file lies in the snapshot itself, as the
library does it. The token is sent to the Hub and not to the hosts it redirects to (`requests` sees to that).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants

from kd.config import HubDataset, HubModel
from kd.errors import UserError, WorkFailedError
from kd.io.download import CHUNK_BYTES, TIMEOUT_S, reason
from kd.io.files import free_bytes, put_file_in_place
from kd.io.place import insist_writable
from kd.io.progress import catch_up, progress, show_state

if TYPE_CHECKING:
    import requests
    from tqdm import tqdm

Repository = HubModel | HubDataset

RETRIES = 5  # in a row, without a byte between them
PAUSE_S = 2.0  # before the first of them; doubled before each further one
NEEDED = {
    "config.json": "a model configuration",
    "*.safetensors": "weights as safetensors",
    "tokenizer.json": "a fast tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}
# Weights, configurations and tokenizer at the top of a repository; no pickles, no code, no second copies in folders.
_TAKEN = re.compile(r"[^/]+\.(safetensors|json)|tokenizer\.model")
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it; `checksum` is a SHA-256 (64 digits) or Git's object id (40 digits)."""

    name: str
    size: int
    checksum: str

    def is_checksum_of(self, path: Path) -> bool:
        """Whether the bytes in `path` are this file's."""
        lfs = len(self.checksum) == 64
        digest = hashlib.sha256() if lfs else hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == self.checksum


def cache() -> Path:
    """The Hub's cache on this machine: $HF_HUB_CACHE, else `hub` under $HF_HOME."""
    return Path(constants.HF_HUB_CACHE)


def repository(source: Repository) -> Path:
    """Everything the cache holds of a repository."""
    kind = "models" if isinstance(source, HubModel) else "datasets"
    return cache() / constants.REPO_ID_SEPARATOR.join([kind, *source.name.split("/")])


def snapshot(source: Repository) -> Path:
    """The folder of a repository's files at its revision in the cache, there or not."""
    return repository(source) / "snapshots" / source.revision


def is_cached(model: HubModel) -> bool:
    """Whether the cache has the model, every shard of its weights included."""
    # Most are links to their blobs, which `exists` follows.
    names = [path.name for path in snapshot(model).glob("*") if path.exists()]
    shards = Counter(match.groups() for name in names if (match := _SHARD.fullmatch(name)))
    return not missing(names) and all(count == int(total) for (_, total), count in shards.items())


def missing(names: Iterable[str]) -> list[str]:
    """The patterns of NEEDED that no name matches."""
    names = list(names)
    return [pattern for pattern in NEEDED if not any(Path(name).match(pattern) for name in names)]


def fetch(models: Sequence[HubModel]) -> None:
    """Bring into the cache what it lacks of `models`, going on with what an earlier run left."""
    wanted = [(model, file) for model in dict.fromkeys(models) if not is_cached(model) for file in listing(model)]
    if not wanted:
        return
    # The small files of all models come first: a model that one may not have is refused before the first gigabyte.
    # Weights come last, so that a folder which has all of them has everything.
    wanted.sort(key=lambda pair: (pair[1].name.endswith(".safetensors"), pair[1].size))
    _check_room(sum(_owed(model, file) for model, file in wanted))
    for folder in {place(model) for model, _ in wanted for place in (repository, _locks)}:
        insist_writable(folder, "set HF_HUB_CACHE to a folder of yours, for the models of the Hub")
    with progress((), "models", "B", sum(file.size for _, file in wanted), scale=True) as bar:
        for model, file in wanted:
            show_state(bar, file.name)
            with _explained(f"{model.name}/{file.name}", ", what came is kept"):
                _fetch_file(model, file, bar)


def listing(model: HubModel) -> list[HubFile]:
    """The files of a model that are taken, from the Hub."""
    with _explained(model.name):
        answer = _get(model, f"/api/models/{model.name}/revision/{model.revision}", params={"blobs": True})
    try:
        rows = [row for row in answer.json()["siblings"] if _TAKEN.fullmatch(row["rfilename"])]
        files = [_hub_file(row) for row in rows]
    except (ValueError, LookupError, TypeError):
        raise WorkFailedError(
            f"{model.name}: {_host()} does not list its files as the Hub does; look at HF_ENDPOINT"
        ) from None
    for pattern in missing(file.name for file in files):
        raise UserError(f"{model.name} at {model.revision[:7]}: no {pattern}; a model needs {NEEDED[pattern]}")
    return files


def check_access(source: Repository) -> None:
    """Ask the Hub for the model's smallest file, or the description of the data; an error says why it is refused."""
    what = f"/api/datasets/{source.name}/revision/{source.revision}"
    with _explained(source.name):
        _get(source, _address(source, "config.json") if isinstance(source, HubModel) else what, stream=True).close()


def read_small(model: HubModel, name: str) -> str:
    """One small text file of a model, from the Hub; it is not kept."""
    with _explained(f"{model.name}/{name}"):
        return _get(model, _address(model, name)).text


def _hub_file(row: dict[str, Any]) -> HubFile:
    """One row of the Hub's listing; ValueError, LookupError or TypeError where it is not one."""
    size, checksum = (row["lfs"]["size"], row["lfs"]["sha256"]) if row.get("lfs") else (row["size"], row["blobId"])
    if not _CHECKSUM.fullmatch(checksum):  # it becomes a file name
        raise ValueError(checksum)
    return HubFile(row["rfilename"], int(size), checksum)


def _blob(model: HubModel, file: HubFile) -> Path:
    return repository(model) / "blobs" / file.checksum


def _locks(model: HubModel) -> Path:
    return cache() / ".locks" / repository(model).name  # the library's own


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has(path: Path, file: HubFile) -> bool:
    return path.exists() and _size(path) == file.size


def _is_there(model: HubModel, file: HubFile) -> bool:
    """Whether a file's blob is in the cache, or where there are no links the file itself."""
    return _has(_blob(model, file), file) or _has(snapshot(model) / file.name, file)


def _owed(model: HubModel, file: HubFile) -> int:
    """The bytes of a file that have still to come."""
    return 0 if _is_there(model, file) else max(0, file.size - _size(_blob(model, file).with_suffix(".part")))


def _check_room(needed: int) -> None:
    free = free_bytes(cache())
    if needed > free:
        raise WorkFailedError(
            f"{cache()}: {needed / 1e9:.1f} GB needed for the models, {free / 1e9:.1f} GB free; make room, or set "
            "HF_HUB_CACHE to a folder on another disk"
        )


def _fetch_file(model: HubModel, file: HubFile, bar: tqdm[Any]) -> None:
    """Fetch one file unless its blob is there, and link it into the snapshot."""
    from huggingface_hub.utils import WeakFileLock

    blob, link = _blob(model, file), snapshot(model) / file.name
    part = blob.with_suffix(".part")
    lock = _locks(model) / f"{file.checksum}.lock"
    for path in (blob, link, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if _is_there(model, file):
            catch_up(bar, file.size)
        else:
            _receive(model, file, part, bar)
            if not file.is_checksum_of(part):
                part.unlink()
                raise WorkFailedError(
                    f"{model.name}/{file.name}: what came does not have the checksum {file.checksum} and was thrown "
                    "away; run the same command again, without a mirror if HF_ENDPOINT names one"
                )
            put_file_in_place(part, blob)
        if not _has(link, file):
            _link(link, blob)


def _link(link: Path, blob: Path) -> None:
    """Let a file of the snapshot be its blob."""
    link.unlink(missing_ok=True)  # to a blob of another cache, or of none
    try:
        link.symlink_to(Path("..", "..", "blobs", blob.name))
    except OSError:  # no links on this file system, and the room for one copy only
        put_file_in_place(blob, link)


def _receive(model: HubModel, file: HubFile, part: Path, bar: tqdm[Any]) -> None:
    """Bring `part` to the file's size, from where it stands and again where the connection breaks."""
    import requests

    part.touch()
    catch_up(bar, _size(part))
    failures = 0
    while (before := _size(part)) < file.size:
        try:
            _append(model, file, part, bar)
        except requests.RequestException:
            failures = 1 if _size(part) > before else failures + 1
            if failures > RETRIES:
                raise
            time.sleep(PAUSE_S * 2 ** (failures - 1))


def _append(model: HubModel, file: HubFile, part: Path, bar: tqdm[Any]) -> None:
    """One request for what `part` lacks; what comes before the connection breaks stays."""
    import requests

    done = _size(part)
    headers = {"Range": f"bytes={done}-", "Accept-Encoding": "identity"} if done else {"Accept-Encoding": "identity"}
    with _get(model, _address(model, file.name), headers=headers, stream=True) as response, part.open("ab") as target:
        if done and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            target.seek(0)  # the server sends the whole file whatever it was asked
            target.truncate()
            catch_up(bar, -done)
        for chunk in response.iter_content(CHUNK_BYTES):
            target.write(chunk)
            bar.update(len(chunk))
            if target.tell() > file.size:  # not the file that was listed; its checksum will not be right either
                return
        if target.tell() < file.size:
            raise requests.ConnectionError


def _address(model: HubModel, name: str) -> str:
    return f"/{model.name}/resolve/{model.revision}/{quote(name)}"


def _get(source: Repository, address: str, headers: dict[str, str] | None = None, **options: Any) -> requests.Response:
    """The Hub's answer; where it refuses, a UserError, and whatever may pass with time is an error of `requests`."""
    import requests

    _check_online(source)
    answer = requests.get(
        f"{constants.ENDPOINT}{address}", headers=_identity() | (headers or {}), timeout=TIMEOUT_S, **options
    )
    # Another host, to which the Hub sent us, answers 403 for an address that has run out of time.
    if urlsplit(answer.url).netloc == urlsplit(constants.ENDPOINT).netloc:
        _check_allowed(source, answer)
    answer.raise_for_status()
    return answer


def _check_online(source: Repository) -> None:
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{source.name} at {source.revision[:7]}: not in the local cache {cache()}, and HF_HUB_OFFLINE is set; "
            "unset it, or set `source: folder` and a path"
        )


def _identity() -> dict[str, str]:
    """The headers that say who asks, with the token if there is one."""
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers(library_name="kd")
    if not re.fullmatch(r"[ -~]*", headers.get("authorization", "")):
        raise UserError("HF_TOKEN: holds characters that no token has; copy the token anew")
    return headers


def _check_allowed(source: Repository, answer: requests.Response) -> None:
    match answer.status_code:
        case 401 if "Authorization" in answer.request.headers:
            raise UserError(f"{source.name}: {_host()} does not accept the token (401); set HF_TOKEN to a valid one")
        case 401:
            raise UserError(
                f"{source.name}: {_host()} asks who you are (401); set HF_TOKEN to a token of yours, or look at the "
                "spelling of `name`"
            )
        case 403:
            raise UserError(
                f"{source.name}: {_host()} refuses it to you (403); ask for access on its page, with the "
                "account whose token HF_TOKEN is, and let the token read gated repositories"
            )
        case 404:
            raise UserError(
                f"{source.name} at {source.revision[:7]}: not found at {_host()} (404); look at `name` and "
                "`revision` in the params file"
            )


def _host() -> str:
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


@contextmanager
def _explained(what: str, state: str = "") -> Iterator[None]:
    """Turn an error of `requests` into a sentence; its own text may hold signed addresses."""
    import requests

    try:
        yield
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        raise UserError("HF_ENDPOINT: not the address of a server; mend or unset it") from None
    except requests.RequestException as error:
        raise WorkFailedError(
            f"{what}: {reason(error)}{state}; run the same command again where there is a network, or name a mirror in "
            "HF_ENDPOINT"
        ) from None
