"""Where and when a result was made: beside the results, under artifacts/<profile>/runs/, and in no checksum, so that
the same params still give the same bytes on another machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from kd.config import Config
from kd.fingerprint import versions
from kd.io.distributed import this_process
from kd.io.files import as_json, whole_file, write_text
from kd.machine.probe import read_driver, read_gpus
from kd.machine.version import read_commit

FOLDER = "runs"
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "exllamav2", "safetensors", "optuna")


@contextmanager
def recorded(config: Config, name: str) -> Iterator[None]:
    """Make the result `name` in the block, and say where, when and by which code."""
    began = datetime.now().astimezone()
    yield
    write_record(config, name, began)


def write_record(config: Config, name: str, began: datetime) -> None:
    """Say where, when and by which code the result `name` (such as train/base-kd-1) was made, which ends now.

    Of several processes each says it for itself, the others than the first with their rank behind the name.
    """
    rank = this_process().rank
    file = config.artifacts / FOLDER / f"{name}{f'.{rank}' if rank else ''}.json"
    with whole_file(
        file, file.with_name(f".{file.name}.{os.getpid()}")
    ) as work:  # whoever else ends now writes his own
        write_text(work, as_json(made_here(began)))


def made_here(began: datetime) -> dict[str, Any]:
    """Where, when and by which code something was made, from `began` until now."""
    ended = datetime.now().astimezone()
    gpus = [gpu.name for gpu in read_gpus()] if "torch" in sys.modules else []  # what did without torch used none
    commit, changed = read_commit()
    return {
        "command": shlex.join(["kd", *sys.argv[1:]]),
        "began": began.isoformat(timespec="seconds"),
        "ended": ended.isoformat(timespec="seconds"),
        "seconds": round((ended - began).total_seconds(), 1),
        "host": platform.node(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "driver": read_driver() if gpus else None,
        "commit": commit,
        "changed": changed,
        "versions": {"python": platform.python_version()} | versions(LIBRARIES),
    }
