"""What is said about data while it is opened."""

import logging
import os
from functools import cache

logger = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    """Warn with a line, once however often the data is opened, and by one of the processes of a run, which all do."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(line)
