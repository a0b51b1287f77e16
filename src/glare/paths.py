"""What a path that somebody typed leads to; none of these questions fails, whatever the text."""

from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal


def local_path(name: str) -> Path:
    """``name`` as a path, a leading ``~`` for the home folder where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def kind_of(path: Path) -> Literal["folder", "file", "other"] | None:
    """What is there, behind links; ``other`` is a pipe, a device or a socket, None is nothing one may look at."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also names that are too long, or that hold a null byte
        return None
    return "folder" if S_ISDIR(mode) else "file" if S_ISREG(mode) else "other"


def printable(name: str) -> str:
    r"""A file name as valid text: a byte of it that is not UTF-8 is written ``\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
