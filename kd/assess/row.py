"""One prompt being continued, as every way of decoding keeps it, and the slots that such rows share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

NAN_TOKEN = -1  # where the logits hold one
NOT_A_NUMBER = "its logits are not numbers (NaN)"
REFILL = 8  # waiting rows join when this fraction (one in REFILL) of the slots is free, not one by one


@dataclass
class Row:
    """One prompt being continued by at most `limit` tokens; `failure` says why it could not be."""

    index: int
    prompt: list[int]
    limit: int
    new: list[int] = field(default_factory=list)
    failure: str | None = None

    @property
    def position(self) -> int:
        """Where its newest token stands, which the next step reads."""
        return len(self.prompt) + len(self.new) - 1

    def add(self, token: int) -> None:
        """One more token, or the mark that there is none."""
        if token == NAN_TOKEN:
            self.failure = NOT_A_NUMBER
        else:
            self.new.append(token)


def join(waiting: deque[Row], active: dict[int, Row], slots: int) -> dict[int, Row]:
    """The waiting rows that take free slots now, by slot: they leave `waiting` and are `active`."""
    free = [slot for slot in range(slots) if slot not in active]
    if not waiting or (active and len(free) * REFILL < slots):
        return {}
    joined = {slot: waiting.popleft() for slot in free[: len(waiting)]}
    active.update(joined)
    return joined


def halved(slots: int, needed: int) -> int:
    """All slots, halved as often as leaves the `needed` ones: so a step has few shapes."""
    while slots // 2 >= needed:
        slots //= 2
    return slots


def lower(active: dict[int, Row], slots: int) -> dict[int, int]:
    """Move the rows of the highest slots below `slots`, into free ones; returns where each has gone."""
    free = (slot for slot in range(slots) if slot not in active)
    moves = {slot: next(free) for slot in list(active) if slot >= slots}
    for slot, free_one in moves.items():
        active[free_one] = active.pop(slot)
    return moves
