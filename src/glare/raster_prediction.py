"""Segment a raster that is larger than memory: by overlapping windows, written row by row as a GeoTIFF.

Where an array's windows are averaged, which would hold the logits of a whole row of windows, a pixel is taken here
from the window in which it lies farthest from an edge.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from glare.data.geotiff import CACHE_BYTES, GDAL_OPTIONS, Box, Raster, rasterio
from glare.data.sources import BadImage, to_rgb8
from glare.data.world_files import read_world_file, world_file_of
from glare.dense_inference import Window
from glare.figures import annotated
from glare.paths import printable
from glare.run_folder import atomic_write, atomic_write_png

logger = logging.getLogger(__name__)

NO_DATA = 255
BLOCK_PX = 256
OVERLAY_PX = 2048  # longer side of the picture for people, at most

Segment = Callable[[Image.Image], NDArray[np.uint8]]
"""RGB image -> class indices (h, w)."""


def predict_raster(
    raster: Raster,
    windows: Sequence[Window],
    segment: Segment,
    *,
    files: tuple[Path, Path],
    classes: Sequence[str],
    colours: NDArray[np.uint8],
) -> None:
    """Write class indices as a GeoTIFF with the raster's georeference, 255 without data, and a reduced overlay.

    Args:
        raster: what to segment.
        windows: rows and columns of overlapping windows in px that cover it, as ``Sweep.windows`` gives them.
        segment: gives the classes of a window.
        files: the GeoTIFF and the PNG, each there whole at the end or not at all.
        classes: their names.
        colours: (classes, 3).

    Raises:
        BadImage: the raster cannot be read.
    """
    small = _Reduced(raster)
    strips = _strips(raster, windows, segment, small)
    reference = _georeference_of(raster)
    atomic_write(files[0], lambda partial: _write_indices(partial, raster, strips, reference, colours))
    atomic_write_png(files[1], annotated(Image.fromarray(small.pixels), small.label, classes, colours))


class _Reduced:
    """Every n-th pixel of image and label: n is the least number with which both sides are `OVERLAY_PX` at most."""

    def __init__(self, raster: Raster) -> None:
        self.step = -(-max(raster.width, raster.height) // OVERLAY_PX)
        height, width = -(-raster.height // self.step), -(-raster.width // self.step)
        self.pixels = np.zeros((height, width, 3), np.uint8)
        self.label = np.full((height, width), NO_DATA, np.uint8)

    def take(self, box: Box, pixels: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
        """Keep what is wanted of a part: pixels (h, w, 3), label (h, w)."""
        chosen = np.s_[-box.top % self.step :: self.step, -box.left % self.step :: self.step]
        top, left = -(-box.top // self.step), -(-box.left // self.step)
        height, width = label[chosen].shape
        self.label[top : top + height, left : left + width] = label[chosen]
        self.pixels[top : top + height, left : left + width] = pixels[chosen]


def _strips(
    raster: Raster, windows: Sequence[Window], segment: Segment, small: _Reduced
) -> Iterator[NDArray[np.uint8]]:
    """Class indices, some whole rows at a time, from the top."""
    rows, columns = (sorted({(span[axis].start, span[axis].stop) for span in windows}) for axis in (0, 1))
    kept_columns = _kept(columns)
    for (top, bottom), (first, last) in zip(
        tqdm(rows, desc=raster.file.name, unit="row", leave=False), _kept(rows), strict=True
    ):
        strip = np.full((last - first, raster.width), NO_DATA, np.uint8)
        for (left, right), (start, stop) in zip(columns, kept_columns, strict=True):
            image = _read(raster, Box(left, top, right - left, bottom - top))
            inside = np.s_[first - top : last - top, start - left : stop - left]
            rgb = to_rgb8(image)
            label = _classes(image, rgb, segment)[inside]
            strip[:, start:stop] = label
            small.take(Box(start, first, stop - start, last - first), np.asarray(rgb)[inside], label)
        yield strip


def _read(raster: Raster, box: Box) -> Image.Image:
    try:
        return raster.read(box)
    except ValueError as error:
        raise BadImage(printable(raster.file.name), str(error)) from error


def _classes(image: Image.Image, rgb: Image.Image, segment: Segment) -> NDArray[np.uint8]:
    """Class indices (h, w) of a window ``image``, which is ``rgb`` for a model; 255 where it has no data.

    A window without data is not segmented.
    """
    if image.mode != "RGBA":
        return segment(rgb)
    valid = np.asarray(image.getchannel("A")) > 0
    if not valid.any():
        return np.full(valid.shape, NO_DATA, np.uint8)
    return np.where(valid, segment(rgb), NO_DATA).astype(np.uint8)


def _kept(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which part of each of some overlapping spans of an axis is kept: up to the middle of each overlap."""
    middles = [(after[0] + before[1]) // 2 for before, after in pairwise(spans)]
    return list(zip([spans[0][0], *middles], [*middles, spans[-1][1]], strict=True))


def _georeference_of(raster: Raster) -> dict[str, Any]:
    """Where a raster lies, as rasterio's writers take it: coordinate system, and transform or control points."""
    with raster.reader.opened(raster.file) as dataset:
        points, system = dataset.gcps
        if points:
            return {"gcps": points, "crs": system}
        transform, system = dataset.transform, dataset.crs
    if transform.is_identity:
        transform = _beside(raster.file) or transform
    return {"transform": transform, "crs": system}


def _beside(file: Path) -> Any:
    """The transform in the world file of a TIFF without georeference; None, which is said, where there is none."""
    world = world_file_of(file)
    name, why = printable(file.name), "and no world file beside it"
    if world is not None:
        try:
            return rasterio().Affine(*read_world_file(world))
        except ValueError as error:
            why = f"and {printable(world.name)} is no world file: {error}"
    logger.warning(f"{name} has no georeference {why}; nor has its label map")
    return None


def _write_indices(
    file: Path,
    raster: Raster,
    strips: Iterable[NDArray[np.uint8]],
    georeference: dict[str, Any],
    colours: NDArray[np.uint8],
) -> None:
    """Write class indices as a compressed GeoTIFF with the sides of ``raster``.

    ``strips`` (rows, width) from the top, ``colours`` (k, 3). Raises OSError where it cannot be written.
    """
    gdal = rasterio()
    sides = {"width": raster.width, "height": raster.height, "blockxsize": BLOCK_PX, "blockysize": BLOCK_PX}
    form = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": NO_DATA, "tiled": True, "compress": "deflate"}
    warnings.filterwarnings("ignore", category=gdal.errors.NotGeoreferencedWarning)
    with (
        gdal.Env(**GDAL_OPTIONS, GDAL_CACHEMAX=CACHE_BYTES),
        gdal.open(file, "w", **form, **sides, **georeference, BIGTIFF="IF_SAFER") as written,
    ):
        written.write_colormap(1, {index: tuple(map(int, colour)) for index, colour in enumerate(colours)})
        top = 0
        for rows in _in_blocks(strips):
            written.write(rows, 1, window=gdal.windows.Window(0, top, raster.width, len(rows)))
            top += len(rows)


def _in_blocks(strips: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The rows of strips as whole rows of blocks, each of which is compressed once; what is left at the end is last."""
    waiting: list[NDArray[np.uint8]] = []
    for strip in strips:
        rows = np.concatenate([*waiting, strip])
        ready = len(rows) // BLOCK_PX * BLOCK_PX
        if ready:
            yield rows[:ready]
        waiting = [rows[ready:]]
    yield from (rows for rows in waiting if len(rows))
