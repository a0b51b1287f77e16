"""Small GeoTIFFs of any kind, and labelled folders of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from labelled_samples import CLASSES, COLOURS
from numpy.typing import NDArray
from rasterio import Affine

CRS, TRANSFORM = "EPSG:32633", Affine(0.2, 0, 500_000, 0, -0.2, 5_000_000)


def write_raster(file: Path, values: NDArray[Any], **options: Any) -> Path:
    """``values`` (bands, h, w) as a GeoTIFF with a georeference; ``options`` of GDAL's writer, such as nodata."""
    count, height, width = values.shape
    size = {"count": count, "height": height, "width": width, "dtype": str(values.dtype)}
    place = {"crs": CRS, "transform": TRANSFORM}
    file.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        file, "w", driver="GTiff", **{**size, **place, "photometric": "MINISBLACK", **options}
    ) as raster:
        raster.write(values)
    return file


def noise(
    bands: int, height: int, width: int, *, dtype: str = "uint16", low: int = 1, high: int = 3000
) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, (bands, height, width)).astype(dtype)


def write_scene(folder: Path, name: str = "scene", *, side: int = 96, dtype: str = "uint16") -> Path:
    """A labelled folder of one scene of 4 bands, whose class is its colour; bands are infrared, red, green, blue."""
    y, x = np.mgrid[:side, :side]
    label = (x * 3 // side).astype(np.uint8)
    label[y > side // 2] = label[y > side // 2][::-1]
    rgb = COLOURS[label].transpose(2, 0, 1).astype(dtype)
    scene = np.concatenate([noise(1, side, side, dtype=dtype, high=250), rgb * (1 if dtype == "uint8" else 10)])
    write_raster(folder / "images" / f"{name}.tif", scene, tiled=True, blockxsize=32, blockysize=32)
    write_raster(folder / "labels" / f"{name}.tif", label[None], tiled=True, blockxsize=32, blockysize=32)
    content = {"classes": CLASSES, "ignore_index": 255, "palette": COLOURS.tolist()}
    (folder / "classes.json").write_text(json.dumps(content))
    return folder
