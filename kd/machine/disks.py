"""What results, DVC's copies and models are to take of their disks, which may be one; and what mends a shortage.

`kd doctor` holds what params say they need against it, `kd rehearse` what it reckons.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kd.config import Config, HubModel
from kd.machine.probe import GIB, Disk

RESULTS, COPIES, MODELS = "results", "DVC's copies", "models"


@dataclass(frozen=True)
class Owed:
    """So many GiB of one of the three that are still to come to its disk."""

    name: str
    gib: float
    disk: Disk


def on_disk_of(one: Owed, owed: Sequence[Owed]) -> list[Owed]:
    """All that is to come to the disk of one of them."""
    return [other for other in owed if other.gib and other.disk.device == one.disk.device]


def mends(params: Config) -> dict[str, str]:
    """What moves each of the three to a larger disk."""
    if "KD_ENVIRONMENT" in os.environ:  # in the image, whose places are fixed
        volume = "mount a volume of a larger disk at /kd/artifacts"
        return {RESULTS: volume, COPIES: volume, MODELS: "mount a larger disk at /models"}
    hub = any(isinstance(model, HubModel) for model in (params.teacher.model, params.student.model))
    return {
        RESULTS: "move this whole checkout to a larger disk",
        COPIES: "`mv .dvc/cache FOLDER` to a larger disk, then `dvc cache dir --local FOLDER`",
        MODELS: f"set {'HF_HUB_CACHE' if hub else 'KD_CACHE'} to a folder on a larger disk",
    }


def shortage(params: Config, owed: Sequence[Owed]) -> str | None:
    """Why something does not fit its disk, and what to do; None where all does."""
    for one in owed:
        together = on_disk_of(one, owed)
        if sum(other.gib for other in together) * GIB > one.disk.free:
            ways = dict.fromkeys(mends(params)[other.name] for other in together)  # each once
            return (
                f"disk: {' and '.join(f'{other.gib:.1f} GiB of {other.name}' for other in together)} are to lie on the "
                f"disk of {one.disk.path}, which has {one.disk.free / GIB:.1f} free; make room, or {', or '.join(ways)}"
            )
    return None
