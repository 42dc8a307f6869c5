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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kd.io.files import sha256

HERE = Path(__file__).parent
KEY_DIGITS = 16
# What cannot change a result: what is said, who does which part, how bytes come here that are compared with a checksum,
# and how params are read, whose values are in every key.
NEUTRAL = frozenset(
    "kd kd.cli kd.config kd.errors kd.fingerprint kd.io.distributed kd.io.download kd.io.progress kd.models.hub".split()
)
WEIGHTS = "*.safetensors"
READ_WITH_WEIGHTS = ("*.json", "*.model")  # configuration and tokenizer
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
    A file of the Hub's cache is a link to one that has its checksum for a name, which was compared as it was fetched.
    """
    weights = sorted(folder.glob(WEIGHTS))
    small = sorted({path for pattern in READ_WITH_WEIGHTS for path in folder.glob(pattern)})
    record = folder.parent / f".{folder.name}.sha256.json"
    known = _read_record(record)
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(weights, pool.map(lambda path: _weights_sha256(path, known), weights), strict=True))
    fresh = {path.name: [*_stamp(path), digest] for path, digest in sums.items() if not _hub_name(path)}
    if fresh != known and fresh:
        _write_record(record, fresh)
    document = [(path.name, sums.get(path) or sha256(path)) for path in [*weights, *small]]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _weights_sha256(path: Path, known: Mapping[str, Any]) -> str:
    if name := _hub_name(path):
        return name
    size, time, digest = known.get(path.name, (None, None, ""))
    return str(digest) if [size, time] == _stamp(path) else sha256(path)


def _hub_name(path: Path) -> str | None:
    """The checksum that a file of the Hub's cache is called by."""
    name = path.resolve().name
    return name if path.is_symlink() and BLOB.fullmatch(name) else None


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
