"""Finished rows on disk, so that a killed assessment does again only what was in flight.

A folder of JSON lines files, one for each process that works on it. A line counts when its line end is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from kd.errors import UserError
from kd.scoring.log import Response


class Journal:
    """The responses in `folder`, by row index; this process, `rank`, adds to a file of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.path = folder, folder / f"{rank}.jsonl"
        if self.path.exists():
            os.truncate(self.path, len(_whole_lines(self.path)))  # a kill may have torn the last line

    def add(self, responses: Mapping[int, Response]) -> None:
        """Append responses and return once they are on the disk."""
        lines = [json.dumps({"row": row, **asdict(response)}) + "\n" for row, response in responses.items()]
        with self.path.open("a", encoding="ascii") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[int, Response]:
        """Every response that this or another process finished."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
                try:
                    entry = json.loads(line)
                    row = entry.pop("row")
                    found[row] = Response(**entry)
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise UserError(
                        f"{path} line {number}: not a finished row; remove the line and run again"
                    ) from None
        return found


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
