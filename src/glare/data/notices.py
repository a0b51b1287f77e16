"""What is said about data while it is opened."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

logger = logging.getLogger(__name__)

_QUIET = ContextVar("_QUIET", default=False)


def say(line: str) -> None:
    """Warn with a line, by one of the processes of a run, which all open the same data."""
    if os.environ.get("RANK", "0") == "0" and not _QUIET.get():
        logger.warning(line)


@contextmanager
def quietly() -> Iterator[None]:
    """Say nothing of data that is opened for its names, or once more."""
    before = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(before)


@cache
def say_once(line: str) -> None:
    """As ``say``, once however often the data is opened."""
    say(line)
