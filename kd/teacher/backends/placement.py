"""Which part of a model lies on which GPU: even by time, for the GPUs work at once, and with room for the work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from kd.errors import UserError
from kd.models.settings import Settings

GIB = 2**30
LIBRARIES = 3 * GIB // 4  # of a GPU, for the code and the work space of CUDA's libraries, and for what lies between


@dataclass(frozen=True)
class Part:
    """A module, which is on one GPU as a whole: its number of weights, to which its time is proportional, and bytes."""

    weights: int
    size: int


@dataclass(frozen=True)
class Forward:
    """The largest that there will be: `rows` questions of `tokens` tokens through a model of that shape."""

    shape: Settings
    quantized: bool
    rows: int
    tokens: int

    def size(self, rows: int | None = None) -> int:
        """The bytes that it takes on each GPU beside the weights, or that one of other `rows` would take."""
        shape, tokens = self.shape, (rows or self.rows) * self.tokens
        hidden, inner = shape.hidden_size, shape.intermediate_size
        scratch = hidden * inner + tokens * (hidden + 2 * inner)  # a dequantized weight, and the insides of an MLP
        rotations = 2 * shape.context * hidden // shape.heads
        # States; queries, keys and values, the latter two repeated for every head; what attention makes of them, twice.
        attention = tokens * (hidden + 7 * hidden)
        # Unless it is quantized, an MLP has its insides three times, and its input and output.
        mlp = 0 if self.quantized else 3 * tokens * (inner + hidden)
        return 2 * (scratch + rotations + max(attention, mlp)) + LIBRARIES  # all in float16


def place(parts: Sequence[Part], free: Sequence[int], forward: Forward) -> list[int]:
    """How many of `parts`, which follow one another, each GPU gets of those with so many bytes `free`.

    UserError where they do not fit: what is needed, what is there, and what would fit.
    """
    counts = spread(parts, [room - forward.size() for room in free])
    if counts is None:
        raise UserError(_refusal(parts, free, forward))
    return counts


def spread(parts: Sequence[Part], rooms: Sequence[int]) -> list[int] | None:
    """The counts of consecutive `parts` with which the GPU that has most to do has least, and none holds more bytes
    than its room; None where they do not fit."""
    sums = [0, *accumulate(part.weights for part in parts)]
    bounds = sorted({later - earlier for earlier, later in combinations(sums, 2)})
    best = bisect_left(bounds, True, key=lambda most: _fill(parts, rooms, most) is not None)
    return _fill(parts, rooms, bounds[best]) if best < len(bounds) else None


def _fill(parts: Sequence[Part], rooms: Sequence[int], most: int) -> list[int] | None:
    """Every GPU full, one after another, with no more than `most` weights; None where parts are left over."""
    counts, done = [], 0
    for room in rooms:
        first, weights, size = done, 0, 0
        while done < len(parts):
            weights, size = weights + parts[done].weights, size + parts[done].size
            if weights > most or size > room:
                break
            done += 1
        counts.append(done - first)
    return counts if done == len(parts) else None


def _refusal(parts: Sequence[Part], free: Sequence[int], forward: Forward) -> str:
    weights, beside = sum(part.size for part in parts), forward.size()
    there = ", ".join(f"{room / GIB:.1f}" for room in free)
    return (
        f"teacher: {len(free)} GPUs need {(weights / len(free) + beside) / GIB:.1f} GiB each for its layers "
        f"({weights / GIB:.1f} in all) and a forward of {forward.rows} questions of {forward.tokens} tokens "
        f"({beside / GIB:.1f}), and have {there} GiB free; {_mend(parts, free, forward)}"
    )


def _mend(parts: Sequence[Part], free: Sequence[int], forward: Forward) -> str:
    """What would fit: fewer rows on these GPUs, or the same on so many of the largest among them."""

    def lacks(rooms: Sequence[int], rows: int) -> bool:
        beside = forward.size(rows)
        return _fill(parts, [room - beside for room in rooms], sum(part.weights for part in parts)) is None

    rows = bisect_left(range(1, forward.rows), True, key=lambda rows: lacks(free, rows))
    counts = range(1, len(parts) + 1)
    enough = bisect_left(counts, True, key=lambda count: not lacks([max(free)] * count, forward.rows))
    mends = [f"set `teacher.batch_rows` to {rows}"] if rows else []
    mends += [f"take {counts[enough]} GPUs with {max(free) / GIB:.1f} GiB free"] if enough < len(counts) else []
    return " or ".join(mends) or "take GPUs with more memory, or a smaller teacher"
