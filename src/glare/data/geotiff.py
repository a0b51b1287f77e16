"""GeoTIFFs of many bands, many bits or more pixels than memory holds, read in parts by rasterio (GDAL).

One conversion to 8 bits holds for all parts of a file: whole numbers of 8 bits stay as they are; of others each band
is stretched from its 2nd to its 98th percentile over spots of the file (`SPOTS` by `SPOTS` of `SPOT_PX` px, without
nodata), what lies outside is clipped. Parts are RGB, or RGBA where pixels have no data: by the file's nodata value,
its mask or alpha band, or because they are not finite.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.label_files import LOSSY, LastLabel, means_nothing
from glare.data.opening import MAX_PIXELS
from glare.errors import UserError, first_line
from glare.paths import kind_of

EXTRA = "pip install 'glare-ssl[geotiff]'"
SPOTS, SPOT_PX = 16, 64
PERCENTILES = (2, 98)
HUGE = 1e300  # a value whose difference from another may be no number
CACHE_BYTES, MOST_CACHE_BYTES = 2**28, 2**29  # of decoded blocks
USUAL_ROWS = 1024  # of a window
MAX_BANDS = 1000
MAX_BLOCK_BYTES = 2**28  # of a block that has to be decoded whole
GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no files beside it: they may lead anywhere
    "GDAL_PAM_ENABLED": "NO",
}
_ONE_AT_A_TIME = Lock()
logging.getLogger("rasterio").addHandler(logging.NullHandler())  # what it complains about is an error, or harmless


class Box(NamedTuple):
    """A part of a raster in px."""

    left: int
    top: int
    width: int
    height: int

    @property
    def middle(self) -> "Box":
        """At most `SPOT_PX` square."""
        width, height = min(SPOT_PX, self.width), min(SPOT_PX, self.height)
        return Box(self.left + (self.width - width) // 2, self.top + (self.height - height) // 2, width, height)


def rasterio() -> Any:
    """The package of this name; UserError without it."""
    try:
        import rasterio
        import rasterio.windows
    except ImportError as error:
        raise UserError(f"GeoTIFFs like this one are read by rasterio, which is not installed; {EXTRA}") from error
    return rasterio


def is_installed() -> bool:
    """Whether there is rasterio."""
    try:
        rasterio()
    except UserError:
        return False
    return True


class Reader:
    """Opens rasters one at a time, whichever thread asks; the last one stays open and keeps its decoded blocks.

    ``last_label`` does so for labels that are no rasters.
    """

    def __init__(self) -> None:
        self.last_label = LastLabel()
        self._file: Path | None = None
        self._dataset: Any = None
        self._cache = CACHE_BYTES

    @contextmanager
    def opened(self, file: Path) -> Iterator[Any]:
        """The rasterio dataset of a GeoTIFF, of which no other format is taken; ValueError if it cannot be read."""
        gdal = rasterio()
        with _ONE_AT_A_TIME, gdal.Env(**GDAL_OPTIONS):
            try:
                if file != self._file:
                    self._open(file, gdal)
                with gdal.Env(GDAL_CACHEMAX=self._cache):
                    yield self._dataset
            except (gdal.errors.RasterioError, gdal._err.CPLE_BaseError) as error:  # the second where a tag is read
                reason = first_line(error.__cause__ or error).rstrip(".")
                raise ValueError(f"it is damaged or cut off ({reason}); copy or export it again") from error

    def _open(self, file: Path, gdal: Any) -> None:
        if self._dataset is not None:
            self._dataset.close()
        self._file = self._dataset = None
        if kind_of(file) != "file":
            raise ValueError("it is no regular file; remove it")
        warnings.filterwarnings("ignore", category=gdal.errors.NotGeoreferencedWarning)
        dataset = gdal.open(file.absolute(), driver="GTiff", sharing=False)
        try:
            _check(dataset)
        except ValueError:
            dataset.close()
            raise
        self._file, self._dataset, self._cache = file, dataset, _cache_for(dataset)


@dataclass(frozen=True)
class Raster:
    """A GeoTIFF as RGB: sides in px, how many bands of which type it has, and which of them, from 1, are RGB.

    ``masked``: the file says of some pixels that they have no data. ``picture`` (height, width): what a model is
    measured on, the whole or its windows.
    """

    file: Path
    reader: Reader
    width: int
    height: int
    count: int
    dtype: str
    bands: tuple[int, int, int]
    masked: bool
    picture: tuple[int, int] | None = None

    @property
    def whole(self) -> Box:
        """All of it."""
        return Box(0, 0, self.width, self.height)

    @property
    def form(self) -> str:
        """Number and type of its bands, for people."""
        return f"{self.count} band{'s' * (self.count > 1)} of {self.dtype}"

    def read(self, box: Box) -> Image.Image:
        """A part with 8 bits: RGBA where pixels have no data, else RGB; ValueError if it cannot be read."""
        if box.width * box.height > MAX_PIXELS:
            raise ValueError(
                f"{box.width} x {box.height} px are too many at once; give raster.tile of at most "
                f"{math.isqrt(MAX_PIXELS)}, or leave it out"
            )
        values, valid = self._values(box)
        rgb = [self._to_8_bit(band, values[place]) for band, place in enumerate(self._places)]
        if not valid.all():
            rgb.append(valid.astype(np.uint8) * 255)
        return Image.fromarray(np.dstack(rgb))

    def share_of_data(self, box: Box) -> float:
        """The share of pixels in a part that have data, 0 to 1, judged by its middle."""
        may_lack = self.masked or self.dtype.startswith("float")
        return float(self._values(box.middle)[1].mean()) if may_lack else 1.0

    @cached_property
    def stretch(self) -> list[tuple[float, float]]:
        """The values that become 0 and 255 in red, green and blue, from spots that are spread evenly.

        They are looked for at the first picture, as to list a folder it takes none.
        """
        kept: list[NDArray[Any]] = []
        for spot in spots(self.width, self.height, SPOTS):
            values, valid = self._values(spot)
            kept.append(values[:, valid])
        limits = [_limits(band) for band in np.concatenate(kept, axis=1).astype(np.float64)]
        return [limits[place] for place in self._places]

    @property
    def _own(self) -> list[int]:
        """The different bands that are read."""
        return sorted(set(self.bands))

    @property
    def _places(self) -> list[int]:
        """Where in what is read red, green and blue are."""
        return [self._own.index(band) for band in self.bands]

    def _values(self, box: Box) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The different bands (n, h, w), and which pixels have data (h, w)."""
        with self.reader.opened(self.file) as dataset:
            window = rasterio().windows.Window(*box)
            values = dataset.read(self._own, window=window)
            valid = np.ones(values.shape[1:], bool)
            if self.masked:
                valid = (dataset.read_masks(self._own, window=window) > 0).any(axis=0)
        return values, valid & np.isfinite(values).any(axis=0) if values.dtype.kind == "f" else valid

    def _to_8_bit(self, band: int, values: NDArray[Any]) -> NDArray[np.uint8]:
        if self.dtype == "uint8":
            return values.astype(np.uint8, copy=False)
        black, white = self.stretch[band]
        with np.errstate(over="ignore", invalid="ignore"):
            share = (values.astype(np.float64) - black) / (white - black)
        grey: NDArray[np.float64] = np.rint(np.clip(np.nan_to_num(share), 0, 1) * 255)
        return grey.astype(np.uint8)


def open_raster(file: Path, reader: Reader, *, bands: tuple[int, int, int] | None = None) -> Raster:
    """A GeoTIFF, of which the header, the first and the last pixel are read.

    ``bands``: which are red, green and blue; 1, 2, 3 by default, or the first as grey where there are fewer than 3.
    Where they are given, a band that is declared as alpha is one like others, and no transparency. Raises
    ValueError, which says why, for one that cannot be read.
    """
    with reader.opened(file) as dataset:
        colours = [colour.name for colour in dataset.colorinterp]
        opaque = len(colours) - colours.count("alpha")
        given, bands = bands, bands or ((1, 2, 3) if opaque >= 3 else (1, 1, 1))
        if max(bands) > dataset.count:
            raise ValueError(f"it has {dataset.count} bands, raster.bands asks for {max(bands)}; give bands it has")
        if colours[bands[0] - 1] == "palette":
            raise ValueError(
                "its values are indices of a palette; leave raster.tile and raster.bands out, or expand it"
            )
        dtype = str(dataset.dtypes[0])
        flags = {flag.name for band in bands for flag in dataset.mask_flag_enums[band - 1]}
        no_alpha = given is not None or any(colours[band - 1] == "alpha" for band in bands)
        masked = not ("all_valid" in flags or ("alpha" in flags and no_alpha))
        raster = Raster(file, reader, dataset.width, dataset.height, dataset.count, dtype, bands, masked)
    for left, top in ((0, 0), (raster.width - 1, raster.height - 1)):
        raster._values(Box(left, top, 1, 1))
    return raster


def _check(dataset: Any) -> None:
    """ValueError for what cannot be read in parts, or is no picture."""
    if dataset.count > MAX_BANDS:
        raise ValueError(f"it has {dataset.count} bands, at most {MAX_BANDS} are read; write fewer into a file")
    dtype = str(dataset.dtypes[0])
    if dtype.startswith("complex"):
        raise ValueError(f"its values are complex numbers ({dtype}); write their magnitude, or bands of real numbers")
    block = math.prod(dataset.block_shapes[0]) * np.dtype(dtype).itemsize
    if str(dataset.profile.get("interleave")) == "pixel":
        block *= dataset.count
    if block > MAX_BLOCK_BYTES:
        raise ValueError(
            f"its blocks of {block / 1e6:.0f} MB have to be decoded whole, at most {MAX_BLOCK_BYTES / 1e6:.0f} MB are; "
            "write it again in tiles (gdal_translate -co TILED=YES)"
        )


def _cache_for(dataset: Any) -> int:
    """Bytes of decoded blocks to keep: of strips, to which a row of windows comes back each time, all of the row."""
    rows, columns = dataset.block_shapes[0]
    if columns < dataset.width:
        return CACHE_BYTES
    row = int(dataset.width) * dataset.count * np.dtype(dataset.dtypes[0]).itemsize
    return int(min(max(CACHE_BYTES, row * (USUAL_ROWS + rows)), MOST_CACHE_BYTES))


def spots(width: int, height: int, per_axis: int) -> list[Box]:
    """At most ``per_axis`` times ``per_axis`` parts of at most `SPOT_PX` square, spread evenly over a raster."""

    def along(length: int) -> list[int]:
        count = min(per_axis, math.ceil(length / SPOT_PX))
        return [max(0, (2 * i + 1) * length // (2 * count) - SPOT_PX // 2) for i in range(count)]

    return [
        Box(left, top, min(SPOT_PX, width - left), min(SPOT_PX, height - top))
        for top in along(height)
        for left in along(width)
    ]


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """What becomes black and white: the percentiles, where they are equal the least and greatest value."""
    finite = values[np.abs(values) < HUGE]
    for edges in (PERCENTILES, (0, 100)):
        low, high = np.percentile(finite, edges) if finite.size else (0.0, 1.0)
        if low < high:
            return float(low), float(high)
    return float(low), math.nextafter(float(low), math.inf)


def read_classes(
    file: Path, reader: Reader, box: Box, whole: Box, *, num_classes: int, ignore: int
) -> NDArray[np.int64]:
    """Class indices (h, w) of a part of a label raster, ``ignore`` where it has no data.

    A nodata value that is the index of a class is that class. ``whole``: of its image. Raises ValueError, which says
    why, where there are no such indices.
    """
    with reader.opened(file) as dataset:
        if dataset.count != 1 or np.dtype(dataset.dtypes[0]).kind not in "iu":
            raise ValueError(
                f"it has {dataset.count} bands of {dataset.dtypes[0]}; write one band of whole numbers, class indices"
            )
        if (coding := str(dataset.profile.get("compress")).lower()) in LOSSY:
            raise ValueError(
                f"it is {coding} inside, which may change the indices of classes; write it from what it was made of, "
                "without that"
            )
        if (dataset.width, dataset.height) != whole[2:]:
            raise ValueError(
                f"it has {dataset.width} x {dataset.height} px, the image {whole.width} x {whole.height}; "
                "give them the same size"
            )
        window = rasterio().windows.Window(*box)
        values, valid = dataset.read(1, window=window), dataset.read_masks(1, window=window) > 0
        by_value = any(flag.name == "nodata" for flag in dataset.mask_flag_enums[0])
        nodata = dataset.nodata if by_value else None
    if nodata is not None and not means_nothing(nodata, file, num_classes=num_classes, ignore=ignore):
        valid = np.ones(values.shape, bool)
    return np.where(valid, values.astype(np.int64), ignore)


def announced(raster: Raster, count: int, left_out: int, *, name: str) -> str:
    """One line on what a raster is and how it is read."""
    colours = ", ".join(map(str, raster.bands))
    text = f"{name}: {raster.width} x {raster.height} px, {raster.form}, {colours} as RGB"
    if count + left_out > 1:
        text += f", read as {count} windows"
    return text + (f", {left_out} more left out as mostly nodata" if left_out else "")
