"""A safetensors file written piece by piece, so that a file larger than memory needs no more than its pieces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(
    path: Path, shapes: Shapes, pieces: Iterable[torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of the given dtypes and shapes; `pieces` are their elements end to end, however cut.

    ValueError where the pieces are not as many bytes as the shapes say. Format: a header's length (8 bytes, little
    endian), the header as JSON padded to 8 bytes, the data (https://github.com/huggingface/safetensors).
    """
    header, size = _header(shapes, metadata)
    written = 0
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            written += file.write(tensor_bytes(piece))
    if written != size:
        raise ValueError(f"{path}: {written} bytes where the shapes need {size}")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Bring back the system's error, such as a full disk, out of what safetensors' own writer makes of it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        code = re.search(r"code: (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor as bytes, in row-major order."""
    import torch

    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _header(shapes: Shapes, metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    import torch

    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offset
