"""Signs that a student learned nothing that a table could measure: its loss rose, it never stops, or says one thing.

The rules are for a machine, so that no reader has to look at a curve or at responses first. "Nearly all" is NEARLY_ALL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NEARLY_ALL = 0.95
WORDS = {"loss": "loss rose", "limit": "never stops", "same": "says one thing", "empty": "says nothing"}


def count_alike(responses: Sequence[str]) -> tuple[int, int]:
    """How many of the responses are the commonest one, and how many are empty; white space around them aside."""
    texts = [response.strip() for response in responses]
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return max(counts.values()), counts.get("", 0)


def signs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The signs of collapse in what one run came to (its entry in results.json).

    An untrained student can show them as well; it has not collapsed, since nobody trained it.
    """
    rows, loss = result["rows"], result["loss"]
    found: list[dict[str, Any]] = []
    if loss and loss["rose"]:
        found.append({"by": "loss", "first": loss["first"], "last": loss["last"]})
    if result["at_limit"] >= NEARLY_ALL * rows:
        found.append({"by": "limit", "rows": result["at_limit"]})
    if rows > 1 and result["empty"] >= NEARLY_ALL * rows:
        found.append({"by": "empty", "rows": result["empty"]})
    elif rows > 1 and result["same"] >= NEARLY_ALL * rows:
        found.append({"by": "same", "rows": result["same"]})
    return found


def in_words(sign: Mapping[str, Any], rows: int) -> str:
    """A sign with its numbers."""
    match sign["by"]:
        case "loss":
            return f"its training loss rose from {sign['first']:.3g} to {sign['last']:.3g}"
        case "limit":
            return f"{sign['rows']} of {rows} responses ran into the limit"
        case "empty":
            return f"{sign['rows']} of {rows} responses are empty"
        case _:
            return f"{sign['rows']} of {rows} responses are one and the same"


def collapse(result: Mapping[str, Any]) -> str:
    """That a student collapsed (one that did), and with several seeds in how many of them."""
    return f"{in_seeds(result)} collapsed" if len(result["runs"]) > 1 else "collapsed"


def in_seeds(result: Mapping[str, Any]) -> str:
    """In how many of its seeds a student collapsed."""
    return f"{len(result['collapsed'])} of {len(result['runs'])} seeds"


def named(experiments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those among the students that collapsed, by name, and with several seeds in how many of them."""
    return [
        f"{name} ({in_seeds(one)})" if len(one["runs"]) > 1 else name
        for name, one in experiments.items()
        if one["collapsed"]
    ]
