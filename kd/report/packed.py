"""Which of many questions are right, packed into a line of text for a results file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_right(right: Sequence[bool]) -> str:
    """Which questions are right as hexadecimal digits, four questions each, the first the most significant bit."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()[: _digits(len(right))]


def unpack_right(digits: str, rows: int) -> list[bool]:
    """The `rows` questions of `pack_right`; a ValueError where `digits` are not what it makes of as many."""
    expected = f"expected {_digits(rows)} lower-case hexadecimal digits for {rows} questions, zero bits behind the last"
    try:
        packed = bytes.fromhex(digits + "0" * (len(digits) % 2))
    except ValueError:
        raise ValueError(expected) from None
    right = [bool(bit) for bit in np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=rows)]
    if pack_right(right) != digits:
        raise ValueError(expected)
    return right


def _digits(rows: int) -> int:
    return (rows + 3) // 4
