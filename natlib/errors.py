"""The one error that users of natlib meet."""


class NatlibError(ValueError):
    """Bad input: the message names the value and what is allowed."""
