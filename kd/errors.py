"""The errors that reach the person at the terminal as one sentence."""


class UserError(Exception):
    """Unusable input: the message says what, where (file, row or key) and how to mend it. Exit status 2."""


class WorkFailedError(Exception):
    """The work failed though the input is right (a download, a device): what happened, what to do. Exit status 1."""
