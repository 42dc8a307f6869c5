"""The errors that reach the person at the terminal as one sentence."""

from math import isfinite


class UserError(Exception):
    """Unusable input: the message says what, where (file, row or key) and how to mend it. Exit status 2."""


class WorkFailedError(Exception):
    """The work failed though the input is right (a download, a device): what happened, what to do. Exit status 1."""


def finite(value: float, what: str, mend: str) -> float:
    """A number that is one; else a UserError that says `what` it should have been, and the `mend`."""
    if not isfinite(value):
        raise UserError(f"{what} is {value}, no number; {mend}")
    return value
