"""Progress on stderr: a live bar at a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> tqdm[T]:
    """Iterate with rate and time left; `update` and `set_postfix_str` as on any tqdm bar."""
    live = sys.stderr.isatty()
    return tqdm(items, desc=what, unit=unit, total=total, mininterval=0.2 if live else 10, dynamic_ncols=live)


def say(message: str) -> None:
    """A plain message to the person at the terminal; stdout stays for results."""
    print(message, file=sys.stderr)
