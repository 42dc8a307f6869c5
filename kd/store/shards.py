"""One file of a store: the rows of some examples, which it describes itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import TypeAdapter

from kd.errors import UserError, WorkFailedError
from kd.io.files import sha256, whole_file
from kd.store.records import Kind, Reading, Shard, StoredExample
from kd.store.tensors import tensor_bytes, write_tensors

if TYPE_CHECKING:
    import torch


def shard_file(folder: Path, kind: Kind, number: int) -> Path:
    """Where a store's shard of that number lies."""
    return folder / f"{kind}-{number:05d}.safetensors"


@dataclass(frozen=True)
class ReadBack:
    """A shard as it lies on the disk: its size and checksum, its rows' width, and what they are of."""

    shard: Shard
    width: int
    examples: list[StoredExample]


def write_shard(path: Path, kind: Kind, number: int, pending: list[tuple[Reading, torch.Tensor]]) -> ReadBack:
    """Write the rows of some examples as one file, whole or not at all; returns what then lies on the disk.

    UserError where rows are not finite as float16, which ends at 65,504: they would spoil whatever is made of them.
    """
    import torch

    examples, row = [], 0
    together = torch.cat([rows for _, rows in pending]).to(torch.float16).cpu()  # one transfer from the device
    kept = together.split([len(rows) for _, rows in pending])
    if not together.isfinite().all():
        _refuse_not_finite(kind, pending, kept)
    for (reading, _), rows in zip(pending, kept, strict=True):
        examples.append(
            StoredExample(
                id=reading.example_id,
                token_ids=reading.token_ids,
                span=reading.span,
                shard=number,
                row=row,
                sha256=checksum(rows),
            )
        )
        row += len(rows)
    # The shard describes itself, so a process that goes on, or puts shards together, needs nothing else.
    description = json.dumps([example.model_dump() for example in examples], separators=(",", ":"))
    shapes = {str(kind): (together.dtype, tuple(together.shape))}
    with whole_file(path, path.with_suffix(".part")) as work:
        write_tensors(work, shapes, [together], {"examples": description})
        return read_back(work)  # before it counts as there: then another process may move the folder


def _refuse_not_finite(
    kind: Kind, pending: list[tuple[Reading, torch.Tensor]], kept: tuple[torch.Tensor, ...]
) -> NoReturn:
    reading, rows = next(
        (reading, rows) for (reading, rows), half in zip(pending, kept, strict=True) if not half.isfinite().all()
    )
    largest = rows.float().abs().max().item()
    if isfinite(largest):
        wrong = (
            f"are as large as {largest:.3g}, where a store holds float16, up to 65504; choose another `teacher.model`"
        )
    else:
        wrong = "are not all numbers; look at its weights, or set a wider `teacher.dtype`"
    raise UserError(f"{reading.example_id}: the teacher's {kind} {wrong}")


def read_back(path: Path) -> ReadBack:
    """A shard as it lies on the disk, its rows compared with their checksums."""
    opened, rows = _opened(path), shard_rows(path)
    examples = TypeAdapter(list[StoredExample]).validate_json(opened.metadata()["examples"])
    for example in examples:
        if checksum(rows[example.row : example.row + example.rows]) != example.sha256:
            raise WorkFailedError(f"{path}: its rows are not those that were captured; remove it and go on")
    return ReadBack(Shard(bytes=path.stat().st_size, sha256=sha256(path)), rows.get_shape()[1], examples)


def shard_rows(path: Path) -> Any:
    """The rows of a shard as a slice that reads only those asked for."""
    return _opened(path).get_slice(path.name.partition("-")[0])


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({error}); capture the prompt again") from None


def checksum(rows: torch.Tensor) -> str:
    """SHA-256 of rows' elements."""
    return hashlib.sha256(tensor_bytes(rows)).hexdigest()
