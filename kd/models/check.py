"""What a model folder must be: looked at before work begins, by its settings and the headers of its weights.

Libraries read a folder that is not whole, or that says what they do not know, as another model, without a word: weights
made up, settings passed over, another folder's weights. Here no tensor is read and no library of models is loaded, so
that it takes milliseconds, also for hundreds of gigabytes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from kd.errors import UserError
from kd.models import hub
from kd.models.settings import Settings, check_exllamav2, read_settings
from kd.models.vocabulary import Vocabulary, read_vocabulary
from kd.models.weights import check_weights

Backend = Literal["transformers", "exllamav2"]
Stamps = tuple[tuple[str, int, int], ...]

ADAPTER = "adapter_config.json"


class Contents(NamedTuple):
    """What a folder holds."""

    settings: Settings
    vocabulary: Vocabulary
    quantized: bool


def check_folder(folder: Path, backend: Backend | None = None) -> Contents:
    """What a model folder holds, refused unless it is whole, of one piece and nothing but what this package reads;
    with a `backend`, unless that one reads it as it is meant."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    for pattern in hub.missing(path.name for path in folder.iterdir() if path.is_file()):
        raise UserError(f"{folder}: no {pattern}; a model folder needs {hub.NEEDED[pattern]}")
    found = _contents(folder, _stamps(folder))
    if backend == "transformers" and found.quantized:
        raise UserError(
            f"{folder}: quantized as EXL2, which transformers does not read; set `teacher.backend: exllamav2` for a "
            "teacher on GPUs, or take the model's unquantized folder"
        )
    if backend == "exllamav2":
        check_exllamav2(folder)
    return found


@lru_cache(maxsize=8)
def _contents(folder: Path, stamps: Stamps) -> Contents:
    """Read once, and again when a file has another size or time."""
    del stamps
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{folder / ADAPTER}: transformers would load the model that it names, not this folder's weights; remove it"
        )
    settings = read_settings(folder)
    quantized = check_weights(folder, settings)
    return Contents(settings, read_vocabulary(folder, settings), quantized)


def _stamps(folder: Path) -> Stamps:
    files = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in files)
