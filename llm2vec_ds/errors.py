"""The one error that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one line with the cause and the mend, no traceback."""
