"""One file of a store: the rows of some examples, which it describes itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from kd.errors import UserError, WorkFailedError
from kd.io.files import sha256, whole_file
from kd.store.records import Kind, Reading, Shard, StoredExample
from kd.store.tensors import tensor_bytes, write_tensors

if TYPE_CHECKING:
    import torch


def shard_file(folder: Path, kind: Kind, number: int) -> Path:
    """Where a store\'s shard of that number lies."""
    return folder / f"{kind}-{number:05d}.safetensors"


def write_shard(path: Path, kind: Kind, number: int, pending: list[tuple[Reading, torch.Tensor]]) -> None:
    """Write the rows of some examples as one file, whole or not at all."""
    import torch

    examples, row = [], 0
    together = torch.cat([rows for _, rows in pending]).to(torch.float16).cpu()  # one transfer from the device
    kept = together.split([len(rows) for _, rows in pending])
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


@dataclass(frozen=True)
class ReadBack:
    """A shard as it lies on the disk: its size and checksum, its rows\' width, and what they are of."""

    shard: Shard
    width: int
    examples: list[StoredExample]


def read_back(path: Path) -> ReadBack:
    """A shard as it lies on the disk, its rows compared with their checksums."""
    examples, rows = _described_examples(path), shard_rows(path)
    for example in examples:
        if checksum(rows[example.row : example.row + example.rows]) != example.sha256:
            raise WorkFailedError(f"{path}: its rows are not those that were captured; remove it and go on")
    return ReadBack(Shard(bytes=path.stat().st_size, sha256=sha256(path)), rows.get_shape()[1], examples)


def shard_rows(path: Path) -> Any:
    """The rows of a shard as a slice that reads only those asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt").get_slice(path.name.partition("-")[0])
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({error}); capture the prompt again") from None


def _described_examples(path: Path) -> list[StoredExample]:
    """The examples of a shard, as it says itself."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return TypeAdapter(list[StoredExample]).validate_json(file.metadata()["examples"])


def checksum(rows: torch.Tensor) -> str:
    """SHA-256 of rows\' elements."""
    return hashlib.sha256(tensor_bytes(rows)).hexdigest()
