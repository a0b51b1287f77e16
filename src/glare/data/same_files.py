"""Which file each named image is, whatever links lead to it."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from glare.data.raster_windows import file_of
from glare.paths import printable

MOST_LINKS = 40  # in a row, as Linux allows; more are a circle


def resolved(origin: str, names: Sequence[str]) -> list[str]:
    """The path of each of ``names`` below the folder ``origin`` without links: equal for the same file.

    Windows of a file keep theirs in the name. A name of what is no file, such as a row of a table, has ``origin`` in
    front. Each folder is listed once, so that a file costs no question to the file system and a link one.
    """
    look_up = cache(_look_up)

    def follow(path: str) -> str:
        for _ in range(MOST_LINKS):
            folder, _, last = path.rpartition("/")
            place, links = look_up(folder)
            path = f"{place}/{last}"
            if printable(last) not in links:
                break
            path = os.path.join(place, links[printable(last)])  # noqa: PTH118 - a string is ten times as quick
        return printable(path)

    return [follow(f"{origin}/{file}") + name[len(file) :] for name in names for file in [file_of(name)]]


def _look_up(folder: str) -> tuple[str, dict[str, str]]:
    """A folder without links, and what the links in it say, by their names."""
    if not Path(folder).is_dir():
        return folder, {}
    place = os.path.realpath(folder)
    try:
        with os.scandir(place) as entries:
            links = [entry for entry in entries if entry.is_symlink()]
        return place, {printable(link.name): os.readlink(link) for link in links}  # noqa: PTH115 - as above
    except OSError:  # it may be entered, but not listed, or has just changed
        return place, {}
