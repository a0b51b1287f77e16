"""A full disk is the user's to put right: one sentence instead of whatever the writer raised."""

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from glare.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space, no space left to this user, no file of this size."""


@contextmanager
def room_for(what: object) -> Iterator[None]:
    """Raise UserError where the block finds no room on the disk for ``what``, a path or words.

    A thread of the block that finds none prints no traceback: that of TensorBoard hands its error on to the next call.
    """
    before = threading.excepthook

    def excepthook(failed: threading.ExceptHookArgs, /) -> None:
        if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in FULL):
            before(failed)

    threading.excepthook = excepthook
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in FULL:
            raise
        raise UserError(
            f"there is no room for {what} ({os.strerror(number)}); what was there before is unchanged: "
            "make room, then give the command again, a training with --resume"
        ) from error
    finally:
        threading.excepthook = before


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None
