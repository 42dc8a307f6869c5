"""The one error that is the user's to mend."""


class UserError(Exception):
    """Unusable input: the message says what, where (file, row or key) and how to mend it. Exit status 2."""
