"""Progress on stderr: a live bar at a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None, *, scale: bool = False) -> tqdm[T]:
    """Iterate with rate and time left, or `update` by hand; `scale` counts in k, M, G."""
    live = sys.stderr.isatty()
    interval = 0.2 if live else 10
    return tqdm(items, desc=what, unit=unit, total=total, mininterval=interval, dynamic_ncols=live, unit_scale=scale)


def catch_up(bar: tqdm[Any], done: int) -> None:
    """Count `done` that was there before: it moves the bar, not the rate."""
    bar.initial += done
    bar.n += done
    bar.last_print_n += done


def show_state(bar: tqdm[Any], text: str) -> None:
    """Put `text` behind the bar, redrawn no more often than the bar's own steps would be."""
    bar.set_postfix_str(text, refresh=False)
    if time.time() - bar.last_print_t >= bar.mininterval:
        bar.refresh()
        bar.last_print_t = time.time()
