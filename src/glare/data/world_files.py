"""World files: six numbers beside a picture, scene.tfw for scene.tif, that say where it lies (ESRI's format).

A line each, in this order: A, D, B, E, C, F of x = A col + B row + C, y = D col + E row + F, where column 0, row 0 is
the middle of the first pixel.
"""

import math
from pathlib import Path

from glare.paths import kind_of

ENDINGS = (".tfw", ".tifw", ".tiffw", ".wld")
MAX_BYTES = 1000
NUMBERS = 6


def world_file_of(file: Path) -> Path | None:
    """The world file beside a TIFF, None where there is none."""
    beside = (file.with_suffix(ending) for plain in ENDINGS for ending in (plain, plain.upper()))
    return next((world for world in beside if kind_of(world) == "file"), None)


def read_world_file(file: Path) -> tuple[float, float, float, float, float, float]:
    """(a, b, c, d, e, f) of x = a col + b row + c, y = d col + e row + f, from the corner of the first pixel.

    Raises ValueError, which says why, for another text.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    try:
        numbers = [float(word) for word in text.decode("ascii").split()]
    except ValueError:
        numbers = []
    if len(text) > MAX_BYTES or len(numbers) != NUMBERS or not all(map(math.isfinite, numbers)):
        raise ValueError(f"it is not {NUMBERS} numbers, a line each")
    a, d, b, e, c, f = numbers
    if a * e == b * d:
        raise ValueError("its pixels would have no area")
    return a, b, c - (a + b) / 2, d, e, f - (d + e) / 2
