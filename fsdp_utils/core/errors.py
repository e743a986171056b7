"""The one exception for bad input: it is shown to the user as its message alone, never as a traceback."""

from contextlib import contextmanager

PREEMPTED = 75  # exit code (EX_TEMPFAIL) of a run that was told to stop, and goes on when it is started again


class UserError(ValueError):
    """Bad input. The message is one line: the flag or file, the value, the way out."""


def first_line(error: BaseException) -> str:
    """Of the message of another library's error; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def refuse_code(error: Exception, *, named: str) -> None:
    """Raises UserError if an error means that a model brings code of its own, and nobody said to run it."""
    if "trust_remote_code=True" in str(error):
        raise UserError(
            f"{named}: brings code of its own (auto_map); read it, then pass --trust_remote_code true"
        ) from None


class ConfigError(UserError):
    """Wrong flags, one line for each."""


class Diverged(UserError, FloatingPointError):
    """Loss or gradient is no number any more: the flags do not fit the data."""


@contextmanager
def naming(flag: str):
    """Puts the flag before a message that begins with its value: code below the entry scripts does not know it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


class CheckpointError(UserError):
    """A model folder that cannot be read, said in one line that names the file."""


class DataError(UserError):
    """Bad data. The message is one line: the flag or file, the value, the way out."""


class Ended(Exception):
    """The run ends here in good order, with an exit code of its own."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code
