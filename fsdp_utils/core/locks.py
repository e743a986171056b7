"""One writer at a time, also where the same command is started twice."""

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from fsdp_utils.core.errors import UserError


def make_writable(folder: Path, *, named: str) -> None:
    """Makes a folder, unless it is there. Raises UserError if no file can be written to it.

    Args:
        named: flag and value by which the user knows the place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{named}: {folder}: {error.strerror}; choose a place that can be written to") from None


@contextmanager
def claim(place: Path, *, named: str, flags: int = os.O_RDONLY):
    """Keeps other processes from claiming a file or folder until the block ends, or this process.

    A file system that knows no locks lets everyone in.

    Args:
        named: flag and value by which the user knows the place.
        flags: to open it with.

    Raises:
        UserError: another process has claimed it.
    """
    busy = UserError(f"{named}: another process is writing it; wait for it or choose another")
    descriptor = os.open(place, flags)
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


@contextmanager
def exclusively(target: Path, *, named: str):
    """`claim` of what may not be there yet, through a hidden file beside it.

    Raises:
        UserError: another process has claimed it, or nothing can be written there.
    """
    make_writable(target.parent, named=named)
    lock = target.with_name(f".{target.name}.lock")
    with claim(lock, named=named, flags=os.O_RDWR | os.O_CREAT):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
