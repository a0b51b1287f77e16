"""Whether a fourth band that a GeoTIFF declares as alpha is one: GDAL's writers declare near infrared so by default."""

from itertools import product
from pathlib import Path

import numpy as np

from glare.data.geotiff import SPOT_PX, Reader, rasterio

BAND = 4
SPOTS = 4  # on each axis
MIN_BETWEEN = 0.1  # share of values between the least and the greatest; opaque and transparent are these two


def looks_like_colour(file: Path, reader: Reader) -> bool:
    """Whether band 4 of a TIFF is taken as alpha but has many values between its least and its greatest one.

    Judged by spots of the file; False for what cannot be read.
    """
    try:
        with reader.opened(file) as dataset:
            taken = any(flag.name == "alpha" for flag in dataset.mask_flag_enums[0])  # GDAL leaves that of floats out
            if not taken or dataset.count < BAND or dataset.colorinterp[BAND - 1].name != "alpha":
                return False
            window = rasterio().windows.Window
            spots = [
                dataset.read(BAND, window=window(left, top, *sides))
                for (left, top), sides in _spots(dataset.width, dataset.height)
            ]
    except (ValueError, OSError):
        return False
    values = np.concatenate([spot.ravel() for spot in spots])
    return bool(((values > values.min()) & (values < values.max())).mean() > MIN_BETWEEN)


def _spots(width: int, height: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Left upper corners and sides of spots that are spread evenly, all of them inside."""
    across, down = min(SPOT_PX, width), min(SPOT_PX, height)
    lefts = np.linspace(0, width - across, SPOTS).astype(int).tolist()
    tops = np.linspace(0, height - down, SPOTS).astype(int).tolist()
    return [((left, top), (across, down)) for top, left in product(tops, lefts)]
