"""One writer at a time, also where the same command is started twice."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from methods.errors import UserError


@contextmanager
def claim(place: Path, *, named: str):
    """Keeps other processes from claiming an existing file or folder until the block ends, or this process.

    A file system that knows no locks lets everyone in.

    Args:
        named: flag and value by which the user knows the place.

    Raises:
        UserError: another process has claimed it.
    """
    busy = UserError(f"{named}: another process is writing it; wait for it or choose another")
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # no locks here
            pass
        if not (place.exists() and os.path.samestat(os.fstat(descriptor), os.stat(place))):
            raise busy  # its owner has renamed or removed it since it was opened
        yield
    finally:
        os.close(descriptor)
