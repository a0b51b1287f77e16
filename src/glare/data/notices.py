"""What is said about data while it is opened."""

import logging
import os
from functools import cache

logger = logging.getLogger(__name__)


def say(line: str) -> None:
    """Warn with a line, by one of the processes of a run, which all open the same data."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)


@cache
def say_once(line: str) -> None:
    """As ``say``, once however often the data is opened."""
    say(line)
