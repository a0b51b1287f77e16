"""Whether a fourth band that a GeoTIFF declares as alpha is one: GDAL's writers declare near infrared so by default."""

from pathlib import Path

import numpy as np

from glare.data.geotiff import Reader, rasterio, spots

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
            parts = spots(dataset.width, dataset.height, SPOTS)
            values = np.concatenate([dataset.read(BAND, window=window(*part)).ravel() for part in parts])
    except (ValueError, OSError):
        return False
    return bool(((values > values.min()) & (values < values.max())).mean() > MIN_BETWEEN)
