"""One writer at a time, also where the same command is started twice."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from methods.errors import UserError


@contextmanager
def claim(folder: Path, *, flag: str):
    """Keeps other processes from claiming an existing folder until the block ends, or this process.

    A file system that knows no locks lets everyone in.

    Raises:
        UserError: another process has claimed it.
    """
    busy = UserError(f"--{flag} {folder}: another process is writing it; wait for it or choose another")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # no locks here
            pass
        if not (folder.exists() and os.path.samestat(os.fstat(descriptor), os.stat(folder))):
            raise busy  # its owner has given it another name since it was opened
        yield
    finally:
        os.close(descriptor)
