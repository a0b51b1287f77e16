"""One run a folder: a lock on the folder itself, which leaves no file and which the system frees with the process.

Schedulers that give a job back to the queue may start it anew while the old one still lives. Where the file system
locks no folders, as NFS, a second run is not noticed.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glare.errors import UserError

_held: dict[tuple[int, int], int] = {}  # (device, inode) of a folder -> its open descriptor


def check_free(folder: Path) -> None:
    """Raise UserError where another process has locked ``folder``; any number of processes may ask at once."""
    handle = _lock(folder, fcntl.LOCK_SH)
    if handle is not None:
        os.close(handle)


def take(folder: Path) -> None:
    """Lock ``folder`` until the block of ``released`` or this process ends; UserError where another process has it."""
    handle = _lock(folder, fcntl.LOCK_EX)
    if handle is not None:
        _held[_key(handle)] = handle


@contextmanager
def released() -> Iterator[None]:
    """Free at the end what the block has locked; also as the decorator of a job."""
    before = set(_held)
    try:
        yield
    finally:
        for key in set(_held) - before:
            os.close(_held.pop(key))


def _lock(folder: Path, kind: int) -> int | None:
    """The descriptor of the locked folder; None where this process has it already or it cannot be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if _key(handle) not in _held:
        with suppress(OSError):
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                os.close(handle)
                raise UserError(
                    f"another run is writing into {folder}; wait until it has ended, or stop it, and go on with "
                    "--resume, or give another --output"
                ) from None
    os.close(handle)
    return None


def _key(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino
