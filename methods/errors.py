"""The one exception for bad input: it is shown to the user as its message alone, never as a traceback."""


class UserError(ValueError):
    """Bad input. The message is one line: the flag or file, the value, the way out."""
