"""What a person is told when a GPU's memory runs out in training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kd.config import Config
from kd.errors import WorkFailedError

# What else than torch's own error says that there was no memory left.
SHORTAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
AMOUNTS = re.compile(r"Tried to allocate ([\d.]+ \w+)\..* total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


@contextmanager
def shortage_told(what: str, lower: list[str], kept: Callable[[], str]) -> Iterator[None]:
    """Turn an error that comes of too little GPU memory into a WorkFailedError: how much was missing, which keys to
    `lower`, and what the same command then does with what is `kept`."""
    try:
        yield
    except RuntimeError as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        found = AMOUNTS.search(shortage)
        amounts = f"{found[1]} more asked for, {found[3]} of {found[2]} free" if found else shortage
        raise WorkFailedError(
            f"{what}: the GPU's memory ran out ({amounts}); lower {' or '.join(lower)}, or stop what else uses this "
            f"GPU, then the same command {kept()}"
        ) from error


def lowerable(config: Config) -> list[str]:
    """The keys of params that decide how much memory an update takes, each with its value."""
    settings = config.distill
    keys = [f"`distill.max_tokens` ({settings.max_tokens})"]
    if settings.batch_rows > 1:
        keys.insert(0, f"`distill.batch_rows` ({settings.batch_rows})")
    if config.student.dtype == "float32":
        keys.append("`student.dtype` (float32; bfloat16 takes half)")
    return keys


def _shortage(error: BaseException | None) -> str | None:
    """What an error, or one that it hides, says of a shortage of memory. Where memory runs out while a graph is
    recorded, torch raises another error as it ends the recording."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, torch.cuda.OutOfMemoryError) or any(words in text for words in SHORTAGES):
            return text
        error = error.__cause__ or error.__context__
    return None
