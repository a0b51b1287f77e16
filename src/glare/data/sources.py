"""Unlabelled images: folders, the Hub, parquet and tar shards, and the landcover generator, read as 8-bit RGB.

A source is opened by listing names only; an image is decoded when it is read. Whatever the colour mode and bit
depth of a file, `read` gives RGB with 8 bits, upright; what cannot be read raises `BadImage` with name and reason.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.archives import open_part
from glare.data.catalog import check_unnamed, named, suggestion
from glare.data.deep_colours import file_of_deep_colours, scaled_colours
from glare.data.geotiff import Raster
from glare.data.landcover import parse_landcover
from glare.data.listing import EXTENSIONS, extension_of, image_names
from glare.data.listing import image_files as image_files
from glare.data.listing import natural as natural
from glare.data.matching import matching
from glare.data.opening import open_picture, reason_of
from glare.data.raster_windows import AS_NEEDED, Parts, list_parts
from glare.data.raster_windows import RasterReading as RasterReading
from glare.data.shards import SHARDS, has_shards
from glare.data.tables import HUB_ID, REMOTE, open_table
from glare.errors import UserError
from glare.paths import kind_of, local_path

BEHIND_TRANSPARENT = (124, 116, 104)  # ImageNet's mean colour: no-data areas normalise to about 0
DEPTH_LIMITS = (255, 4095, 65535)  # white of 8, 12 and 16 bits
STRIP_PIXELS = 2**20  # of a large picture that are converted at once
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Exif orientation -> the transposition that undoes it."""


class BadImage(Exception):  # noqa: N818 - a fact about a file, skipped more often than raised
    """An image, or its label, that cannot be used: ``name`` as the source lists it and ``reason``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Source(Protocol):
    """Named images."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """What image ``index`` is called, unique in the source."""

    def read(self, index: int, /) -> Image.Image:
        """Image ``index`` as RGB with 8 bits; BadImage if that is impossible."""


@dataclass(frozen=True)
class Images:
    """A Source over images that Pillow opens: ``open_image(index)`` need not decode yet.

    ``parts``: of which file each is, and which part of it, where they are those of a folder.
    """

    names: Sequence[str]
    open_image: Callable[[int], Image.Image]
    parts: Parts | None = None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What image ``index`` is called: its path in the folder, or its row."""
        return self.names[index]

    def read(self, index: int, *, short_side: int | None = None) -> Image.Image:
        """Image ``index`` as RGB with 8 bits, its short side reduced to ``short_side`` px where it is longer.

        A JPEG that is much too large is decoded at 1/2, 1/4 or 1/8 of its size, but at least twice what is wanted.
        """
        try:
            with self.open_image(index) as image:
                return _read(image, short_side)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers let almost any exception out on a broken file
            raise BadImage(self.names[index], reason_of(error)) from error

    def raster(self, index: int) -> Raster | None:
        """The GeoTIFF that image ``index`` is, or is a window of; None where Pillow reads it."""
        return self.parts[index].raster if self.parts else None

    def subset(self, indices: Iterable[int]) -> "Images":
        """Only the images ``indices``, in that order."""
        kept = list(indices)
        parts = self.parts.subset(kept) if self.parts else None
        return Images([self.names[i] for i in kept], lambda index: self.open_image(kept[index]), parts)


def open_source(
    data: str,
    *,
    split: str | None = None,
    match: str | None = None,
    raster: RasterReading = AS_NEEDED,
    labels: bool = False,
) -> Images:
    """List the images that ``data`` names.

    Args:
        data: a folder (of any depth; of one with ``images`` and ``labels`` side by side only ``images``), an
            image, a parquet file or tar shard, a folder or address of them, a data set of the Hub as ``owner/name`` or
            ``owner/name:configuration``, or ``landcover:<domain>[:count[:seed]]``.
        split: sub-folder of a folder with ``<split>/images``, train, val or test of the catalog's, or a split of
            the Hub's or of shards by their names; None takes all images of a folder, else train, or the only split.
        match: globs on file stems, comma-separated, a leading ``!`` excludes: ``tile[134]_*,!tile1_003``. One with a
            ``/`` is held against the path, from its start or from any folder on: ``train/*``.
        raster: how the GeoTIFFs of folders are read.
        labels: whether pictures of a folder that are called like labels are listed, too.

    Raises:
        UserError: there is no such data or split, it holds no images, or ``match`` selects none.
    """
    path = local_path(data)
    kind = kind_of(path) if data else None
    if kind == "folder":
        images = _open_folder(path, split, raster, labels)
    elif kind == "file":
        images = _open_file(path, split, raster)
    elif data.partition(":")[0] == "landcover":
        check_no_split(data, split)
        scenes = parse_landcover(data)
        images = Images([scenes.name(i) for i in range(len(scenes))], scenes.read)
    elif (wanted := named(data)) is not None:
        part = open_part(wanted, split or wanted.entry.split("train"), labelled=False)
        images = Images(part.names, lambda index: open_picture(part.image(index)))
    elif HUB_ID.fullmatch(data) or data.startswith(REMOTE):
        images = table_images(data, split, raster)
    else:
        raise UserError(
            f"data {data!r} is neither an existing path nor a Hub id (owner/name) nor landcover:<domain>"
            f"{suggestion(data)}; check the spelling, or give a folder of images"
        )
    return images.subset(matching(images.names, match, data=data))


def split_folder(folder: Path, split: str | None) -> Path:
    """The sub-folder of a split, the folder itself for None. Raises UserError where there is no such split."""
    if split is None:
        return folder
    found = splits(folder)
    if split not in found:
        others = split_remedy(folder, split, found)
        raise UserError(f"folder {str(folder)!r} has no split {split!r}, which would be {split}/images; {others}")
    return folder / split


def split_remedy(folder: Path, split: str, found: Sequence[str]) -> str:
    """What to do where ``split`` is none of the splits ``found`` in a folder."""
    if found:
        return f"it has {', '.join(found)}"
    return "leave split out" + (f" and match '{split}/*'" if kind_of(folder / "images" / split) == "folder" else "")


def splits(folder: Path) -> list[str]:
    """Names of the sub-folders that hold ``images``, sorted. Raises UserError for a folder that cannot be listed."""
    try:
        return sorted(part.name for part in folder.iterdir() if (part / "images").is_dir())
    except OSError as error:
        raise UserError(f"folder {str(folder)!r} cannot be listed ({error.strerror}); make it readable") from None


def check_no_split(data: str, split: str | None) -> None:
    """Raise UserError where a split is asked for of data that have none to choose."""
    if split is not None:
        raise UserError(
            f"data {data!r} has no splits to choose from, {split!r} was asked for; leave split out (only data sets of "
            "the catalog and the Hub, tables, and folders with <split>/images have them)"
        )


def fit(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(width, height) in px after reducing the short side to ``short_side``; never larger than ``size``."""
    if short_side is None or min(size) <= short_side:
        return size
    width, height = (round(side * short_side / min(size)) for side in size)
    return width, height


def to_rgb8(image: Image.Image) -> Image.Image:
    """The first frame of any image as RGB with 8 bits, turned upright as its Exif orientation says.

    Transparent parts are laid over ImageNet's mean colour, so that no-data areas normalise to about 0.

    Grey values of more than 8 bits, and colours in PNGs of 16 bits, are scaled by the depth that the image uses: up to
    255 as they are, up to 4095 as 12 bits, up to 65535 as 16 bits; floating-point values up to 1 from 0..1, larger
    ones likewise. An image outside all of these (negative values too) is stretched from its least to its greatest
    value; NaN and infinity are black. Colours in other formats are scaled by the depth that the file declares.
    """
    rgb = _to_rgb(image)
    return _upright(rgb, image)


def _read(image: Image.Image, short_side: int | None) -> Image.Image:
    size = fit(image.size, short_side)
    drafted = image.draft("RGB", (2 * size[0], 2 * size[1])) if size != image.size else None
    rgb = _to_rgb(image)
    if 0 in rgb.size:
        raise ValueError("it has no pixels")
    if rgb.size != size:
        # a draft rounds its size up: the box is what the picture fills of it
        rgb = rgb.resize(size, Image.Resampling.BICUBIC, box=drafted[1] if drafted else None)
    return _upright(rgb, image)


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = file_of_deep_colours(image)
    image.load()
    if deep is not None:
        image = scaled_colours(image, deep)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        return _over_mean_colour(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_mean_colour(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB; rows at a time, to save memory."""
    rgb = Image.new("RGB", image.size)
    for strip in _strips(image.height, image.width):
        part = image.crop((0, strip.start, image.width, strip.stop))
        solid = part.convert("LA") if part.mode == "La" else part
        opaque = Image.new("RGBA", part.size, BEHIND_TRANSPARENT)
        rgb.paste(Image.alpha_composite(opaque, solid.convert("RGBA")).convert("RGB"), (0, strip.start))
    return rgb


def _strips(height: int, width: int) -> list[slice]:
    """Rows of a picture that are worked on together."""
    rows = max(1, STRIP_PIXELS // max(1, width))
    return [slice(first, min(first + rows, height)) for first in range(0, height, rows)]


def _scale_to_8_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey values (h, w) of any range as 8 bits, by the rules of `to_rgb8`; rows at a time, to save memory."""
    strips = _strips(*values.shape)
    edges = [_edges(values[strip]) for strip in strips]
    low, high = min((low for low, _ in edges), default=0.0), max((high for _, high in edges), default=0.0)
    limits = DEPTH_LIMITS if np.issubdtype(values.dtype, np.integer) else (1, *DEPTH_LIMITS)
    white: float | None = next((limit for limit in limits if max(high, 0.0) <= limit), None)
    if low < 0 or white is None:
        black, white = low, max(high - low, 1e-300)
    else:
        black = 0.0
    scaled = np.empty(values.shape, np.uint8)
    for strip in strips:
        grey = values[strip].astype(np.float64)
        finite = np.isfinite(grey)
        scaled[strip] = np.rint(np.where(finite, grey - black, 0) / white * 255)
    return scaled


def _edges(values: NDArray[Any]) -> tuple[float, float]:
    """The least and greatest finite value; infinity and its negative where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    """Undo the orientation that ``original`` declares, asked after loading, when a TIFF has undone its own."""
    try:
        orientation = original.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken metadata, which Pillow reports in many ways, does not spoil the pixels
        return rgb
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def folder_images(parts: Parts) -> Images:
    """The pictures of a folder, as ``list_parts`` gives them."""
    return Images(parts.names(), lambda index: parts[index].open_image(), parts)


def table_images(data: str, split: str | None, raster: RasterReading) -> Images:
    """The images of the table that ``data`` names (see `open_table`), by the number of their row."""
    check_whole(data, raster)
    table = open_table(data, split=split)
    return Images([f"{index:06d}" for index in range(len(table.rows))], lambda index: table.open(table.rows[index]))


def check_whole(data: str, raster: RasterReading) -> None:
    """Raise UserError where windows or bands are asked for of the pictures of a table."""
    if raster.asked:
        raise UserError(
            f"data {data!r} is a table, whose pictures are read whole, but raster.tile or raster.bands is given; leave "
            "that out, or give the GeoTIFFs as files of a folder"
        )


def _open_folder(folder: Path, split: str | None, raster: RasterReading, labels: bool) -> Images:
    if split is not None and not splits(folder) and not image_names(folder) and has_shards(folder):
        return table_images(str(folder), split, raster)
    part = split_folder(folder, split)
    check_unnamed(part, otherwise="the folder of its images alone")
    if names := image_names(part, labels=labels):
        return folder_images(list_parts(part, names, raster))
    if has_shards(part):
        return table_images(str(part), None, raster)
    raise UserError(
        f"folder {str(part)!r} holds no images ({', '.join(EXTENSIONS)}) and no parquet or tar files; "
        "give a folder that does"
    )


def _open_file(file: Path, split: str | None, raster: RasterReading) -> Images:
    extension = extension_of(file.name)
    if extension in SHARDS:
        return table_images(str(file), split, raster)
    check_no_split(str(file), split)
    if extension in EXTENSIONS:
        return folder_images(list_parts(file.parent, [file.name], raster))
    allowed = ", ".join((*EXTENSIONS, *SHARDS))
    raise UserError(f"file {str(file)!r} is no image by its name; give a file named {allowed}, or a folder")
