"""One way to name work: whatever shapes a result makes one key.

Unfinished work lies under its key, and a finished result that has another key than it would be given now is not taken
for right. What shapes a result: the params its stage reads, the bytes it reads, the weights of its models, the code
that makes it, the libraries' versions and the device. The code is the import closure of the stage's module within kd/,
the same that dvc.yaml lists (tests/test_fingerprint.py compares).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.io.files import sha256
from kd.io.progress import progress

HERE = Path(__file__).parent
KEY_DIGITS = 16
# What cannot change a result: what is said, who does which part and who may begin, on which disk, how bytes come here
# that are compared with a checksum, and how params are read, whose values are in every key.
NEUTRAL = frozenset(
    "kd kd.cli kd.config kd.errors kd.fingerprint kd.io.distributed kd.io.download kd.io.lock kd.io.place "
    "kd.io.progress kd.io.stopping kd.models.hub".split()
)
WEIGHTS = "*.safetensors"
READ_WITH_WEIGHTS = ("*.json", "*.model")  # configuration and tokenizer
SHOWN_BYTES = 4 * 2**30  # more than a few seconds' reading is shown
BLOB = re.compile(r"[0-9a-f]{64}")


def key(
    module: str,
    params: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    models: Mapping[str, Path] | None = None,
    libraries: Sequence[str] = (),
    device: str = "",
) -> str:
    """The key of a result that `module` (such as "kd.distill.train") makes: hexadecimal, the same on every machine that
    has the same `params`, bytes of `files`, `models` (folders by role), code, `libraries` and kind of `device`."""
    document = {
        "params": params,
        "files": [sha256(path) for path in files],
        "models": {role: model_sha256(folder) for role, folder in (models or {}).items()},
        "code": code_sha256(module),
        "libraries": versions(libraries),
        "device": device,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """The installed ones of some libraries, with their versions."""
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """What computes here: the first GPU's name, and whether its float32 products are TensorFloat-32's; or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name() + (", TF32" if torch.backends.cuda.matmul.allow_tf32 else "")


@cache
def code_sha256(module: str) -> str:
    """A checksum of the code in a module's closure."""
    document = [(path.relative_to(HERE.parent).as_posix(), sha256(path)) for path in closure(module)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def closure(module: str) -> list[Path]:
    """The files of `module` and of every module in kd/ that it imports, anywhere in its code, but for the neutral ones,
    and what those import; sorted."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path and name not in found and name not in NEUTRAL:
            found[name] = path
            waiting += _imported(path)
    return sorted(found.values())


def model_sha256(folder: Path) -> str:
    """A checksum of a model: its weights, configuration and tokenizer.

    Weights are read once: their checksums are kept beside the folder, with the size and time of each file they are of.
    A UserError names a file of the Hub's cache that is not what the Hub gave.
    """
    weights = sorted(folder.glob(WEIGHTS))
    small = sorted({path for pattern in READ_WITH_WEIGHTS for path in folder.glob(pattern)})
    record = _record(folder)
    known = _read_record(record)
    unread = [path for path in weights if known.get(path.name, [])[:2] != _stamp(path)]
    fresh = {path.name: known[path.name] for path in weights if path not in unread}
    fresh |= {path.name: [*_stamp(path), digest] for path, digest in _read_weights(unread)}
    if unread:
        _write_record(record, fresh)
    document = [*((path.name, fresh[path.name][2]) for path in weights), *((path.name, sha256(path)) for path in small)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _read_weights(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files of weights and their checksums, on all cores, as they are read."""
    size = sum(path.stat().st_size for path in paths)
    bar = progress((), "reading weights", "B", size, scale=True) if size > SHOWN_BYTES else None
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(paths, pool.map(sha256, paths), strict=True):
            name = path.resolve().name  # a file of the Hub's cache is called by its checksum
            if path.is_symlink() and BLOB.fullmatch(name) and name != digest:
                raise UserError(
                    f"{path}: not what the Hub gave, cut or changed; remove {path.resolve()} and fetch it again"
                )
            if bar:
                bar.update(path.stat().st_size)
            yield path, digest
    if bar:
        bar.close()


def _record(folder: Path) -> Path:
    """Where a model's checksums are kept; the Hub's library wants nothing of ours among its snapshots."""
    beside = folder.parent.parent if folder.parent.name == "snapshots" else folder.parent
    return beside / f".{folder.name}.sha256.json"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_record(path: Path) -> dict[str, Any]:
    """What is kept of checksums; nothing where it is not there or not readable, for it is only to save time."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Keep checksums where the folder's neighbourhood can be written."""
    work = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        work.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        work.replace(path)
    except OSError:
        return


def _file(module: str) -> Path | None:
    """Where a module of kd lies; None for one that is none of kd's, or a package that says nothing but what it is."""
    parts = module.split(".")
    if parts[0] != "kd":
        return None
    stem = HERE.joinpath(*parts[1:])
    candidates = (stem.with_suffix(".py"), stem / "__init__.py") if parts[1:] else (HERE / "__init__.py",)
    found = next((path for path in candidates if path.is_file()), None)
    return found if found and (found.name != "__init__.py" or len(_parsed(found).body) > 1) else None


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(path: Path) -> list[str]:
    """The modules that a file imports, names taken from a package as its modules too."""
    found = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found
