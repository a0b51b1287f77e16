"""The pictures of a folder, among which rasters are cut into windows: GeoTIFFs that Pillow reads not at all, or badly.

Badly: it knows no nodata value, and scales numbers of more than 8 bits by the depth that a file may have. What it reads
well is read by it, unless the user says how GeoTIFFs are to be read: then all TIFFs are rasters.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from glare import ranges
from glare.data import geotiff, label_files
from glare.data.geotiff import EXTRA, Box, Raster, Reader, announced, is_installed, open_raster, rasterio
from glare.data.notices import say
from glare.data.opening import open_picture, reason_of
from glare.data.tiff_header import SUFFIXES, TiffHeader, header_of
from glare.data.transparency import looks_like_colour
from glare.data.world_files import world_file_of
from glare.paths import printable
from glare.recipes import option

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its complaints are sentences of ours

TILE_PX, WHOLE = 1024, 0
MIN_SHARE = 0.5  # of the middle of a window that has to have data
MAX_WINDOWS = 100_000  # of one file; more than a header lies about than anybody has
MOST_LINES = 10
WINDOW = re.compile(r"@\d+,\d+$")


@dataclass(frozen=True)
class RasterReading:
    """How GeoTIFFs are read that Pillow reads badly; where windows or bands are given, all TIFFs are read like this."""

    tile: int | None = option(None, "GeoTIFFs: largest side of the windows in px, 0 for none; 1024 where not given")
    bands: tuple[int, int, int] | None = option(None, "GeoTIFFs: bands for red, green and blue; 1,2,3 where not given")

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def asked(self) -> bool:
        """Whether TIFFs are read like this that Pillow reads well, too."""
        return bool(self.tile) or self.bands is not None


@dataclass(frozen=True)
class KeepingPlace(RasterReading):
    """For what is written where a TIFF lies: of those that Pillow reads well, what lies somewhere is a raster, too."""


AS_NEEDED = RasterReading()


@dataclass(frozen=True)
class Part:
    """A picture: a file for Pillow, the part ``box`` of a raster, or what cannot be read for a ``reason``."""

    name: str
    file: Path
    raster: Raster | None = None
    box: Box | None = None
    reason: str = ""

    @property
    def cut(self) -> bool:
        """Whether it is not all of its file."""
        return self.raster is not None and self.box != self.raster.whole

    def open_image(self) -> Image.Image:
        """The picture, which need not be decoded yet. Raises ValueError and whatever Pillow lets out."""
        if self.reason:
            raise ValueError(self.reason)
        if self.raster is None or self.box is None:
            return open_picture(self.file)
        return self.raster.read(self.box)

    def label_file(self, images: Path, labels: Path) -> Path:
        """The file of class indices of a picture of the folder ``images``, which need not be there.

        A PNG of the same name, or a TIFF where there is one; of a picture that is cut, first a TIFF. Their endings may
        be in capitals.
        """
        name = labels / self.file.relative_to(images)
        plain = (*SUFFIXES, ".png") if self.cut else (".png", *SUFFIXES)
        files = [name.with_suffix(suffix) for suffix in (*plain, *map(str.upper, plain))]
        return next((file for file in files if file.is_file()), files[0])

    def read_classes(
        self, file: Path, size: tuple[int, int], reader: Reader, *, num_classes: int, ignore: int
    ) -> NDArray[Any]:
        """Class indices (h, w) of this picture of ``size`` (w, h) px in its label ``file``.

        Raises ValueError, which says why, where there are no such indices.
        """
        if self.raster is None or self.box is None:
            return label_files.read_classes(file, size, num_classes=num_classes, ignore=ignore)
        whole = self.raster.whole
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            if not self.cut:
                return label_files.read_classes(file, whole[2:], num_classes=num_classes, ignore=ignore)
            left, top, width, height = self.box
            part = slice(top, top + height), slice(left, left + width)
            return reader.last_label.read_classes(file, whole[2:], part, num_classes=num_classes, ignore=ignore)
        try:
            return geotiff.read_classes(file, reader, self.box, whole, num_classes=num_classes, ignore=ignore)
        except ValueError as error:
            raise ValueError(f"its label {printable(str(file))} cannot be used: {error}") from error


@dataclass(frozen=True)
class Parts:
    """The pictures of a folder; of those that are whole files for Pillow only the names are held, there are many."""

    folder: Path
    entries: Sequence[str | Part]

    def __getitem__(self, index: int) -> Part:
        entry = self.entries[index]
        return Part(printable(entry), self.folder / entry) if isinstance(entry, str) else entry

    def names(self) -> list[str]:
        """What the pictures are called."""
        return [printable(entry) if isinstance(entry, str) else entry.name for entry in self.entries]

    def subset(self, indices: Sequence[int]) -> "Parts":
        """Only these, in that order."""
        return Parts(self.folder, [self.entries[index] for index in indices])


def file_of(name: str) -> str:
    """The file behind the name of a picture: ``scene.tif`` for scene.tif@0,1024."""
    return WINDOW.sub("", name)


def list_parts(folder: Path, names: Sequence[str], reading: RasterReading = AS_NEEDED) -> Parts:
    """The files ``names`` of a folder; of TIFFs the header is read, and rasters are cut into windows and announced.

    A window is called scene.tif@left,top, in px. Windows of a file are of one size, give or take a pixel, and do not
    overlap; those of which the middle is mostly nodata are left out.
    """
    listing = _Listing(folder, reading)
    for name in names:
        listing.add(name)
    listing.say()
    return Parts(folder, listing.entries)


@dataclass
class _Listing:
    """The pictures of a folder that are found so far, and what there is to say of its TIFFs.

    ``lines``: one for each raster. ``poor``: how many TIFFs have values or nodata that Pillow takes wrongly. ``lost``:
    of how many the place is wanted and not kept. ``alpha``: those whose fourth band may be declared as alpha.
    """

    folder: Path
    reading: RasterReading
    reader: Reader = field(default_factory=Reader)
    entries: list[str | Part] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    poor: int = 0
    lost: int = 0
    alpha: list[Path] = field(default_factory=list)

    def add(self, name: str) -> None:
        """A file of the folder; most are no TIFFs, and there may be a million of them."""
        header = header_of(self.folder / name) if name.lower().endswith(SUFFIXES) else None
        if header is None:
            self.entries.append(name)
            return
        file = self.folder / name
        placed = isinstance(self.reading, KeepingPlace) and _is_placed(header, file)
        if not _is_raster(header, self.reading, placed=placed):
            self.entries.append(name)
            self.alpha += [file] if header.alpha else []
            self.poor += header.plain and header.values
            self.lost += placed
        elif is_installed():
            self._add_raster(name, file, header, placed=placed)
        else:
            self._add_unreadable(name, f"Pillow cannot read such a TIFF, rasterio can; {EXTRA}")

    def _add_raster(self, name: str, file: Path, header: TiffHeader, *, placed: bool) -> None:
        reading = self.reading
        try:
            raster, boxes, kept = _windows(file, self.reader, reading)
            raster = replace(raster, picture=_measured_on(raster, header, reading))
        except (ValueError, OSError, OverflowError) as error:
            if placed and not reading.asked and header.whole and not header.values:  # Pillow reads all but its place
                self.entries.append(name)
                self.lost += 1
            else:
                self._add_unreadable(name, reason_of(error))
            return
        self.alpha += [file] if raster.count > 3 and reading.bands is None else []
        self.lines.append(announced(raster, len(kept), len(boxes) - len(kept), name=printable(name)))
        for box in kept:
            part = Part(printable(name), file, raster, box)
            self.entries.append(replace(part, name=f"{part.name}@{box.left},{box.top}") if part.cut else part)

    def _add_unreadable(self, name: str, reason: str) -> None:
        self.entries.append(Part(printable(name), self.folder / name, reason=reason))

    def say(self) -> None:
        """Announce the rasters, the first ones each in a line, and whatever else there is to say."""
        left = len(self.lines) - MOST_LINES
        lines = self.lines[:MOST_LINES] + ([f"... and {left} more GeoTIFFs"] if left > 0 else [])
        others = _more_with_rasterio(self.poor) + _place_lost(self.lost)
        for line in lines + others + _no_alpha(self.alpha[:MOST_LINES], self.reader):
            say(line)


def _is_placed(header: TiffHeader, file: Path) -> bool:
    """Whether a TIFF, or a world file beside it, says where it lies."""
    return header.placed or world_file_of(file) is not None


def _is_raster(header: TiffHeader, reading: RasterReading, *, placed: bool) -> bool:
    """Whether a TIFF is read by rasterio: Pillow reads it not at all, or badly, or its place is wanted."""
    if reading.asked:
        rasterio()
        return True
    return not header.whole or (header.plain and (header.values or placed) and is_installed())


def _windows(file: Path, reader: Reader, reading: RasterReading) -> tuple[Raster, list[Box], list[Box]]:
    """A raster, its windows, and those that are not mostly nodata; ValueError if it cannot be used."""
    raster = open_raster(file, reader, bands=reading.bands)
    boxes = _grid(raster, reading.tile)
    kept = [box for box in boxes if raster.share_of_data(box) >= MIN_SHARE] if len(boxes) > 1 else boxes
    if not kept:
        raise ValueError("it is nodata nearly everywhere; remove it")
    return raster, boxes, kept


def _measured_on(raster: Raster, header: TiffHeader, reading: RasterReading) -> tuple[int, int]:
    """(height, width) of the pictures that a raster is to other jobs: the whole where Pillow reads it well."""
    if header.whole and not header.values and not reading.asked:
        return raster.height, raster.width
    height, width = (math.ceil(side / math.ceil(side / TILE_PX)) for side in (raster.height, raster.width))
    return height, width


def _more_with_rasterio(count: int) -> list[str]:
    """One line on TIFFs whose values or nodata Pillow takes wrongly."""
    if not count:
        return []
    files = "1 TIFF has" if count == 1 else f"{count} TIFFs have"
    return [f"{files} more than 8 bits or a nodata value, which rasterio reads better than Pillow; {EXTRA}"]


def _place_lost(count: int) -> list[str]:
    """One line on TIFFs of which the place is wanted and not kept."""
    if not count:
        return []
    files = "1 TIFF says where it lies" if count == 1 else f"{count} TIFFs say where they lie"
    why = "rasterio would show other pixels, or none; write grey or RGB in tiles" if is_installed() else EXTRA
    return [f"{files}, which is not kept, as Pillow reads such files: {why}"]


def _no_alpha(files: Sequence[Path], reader: Reader) -> list[str]:
    """One line on the first of some files whose alpha band is none, for all that are like it."""
    if not files or not is_installed():
        return []
    doubtful = next((file for file in files if looks_like_colour(file, reader)), None)
    if doubtful is None:
        return []
    return [
        f"{printable(doubtful.name)}: band 4 is taken as transparency, as the file declares it, though it varies like "
        "a colour (near infrared?); raster.bands=1,2,3 takes all bands as colours, in all such files"
    ]


def _grid(raster: Raster, tile: int | None) -> list[Box]:
    """Windows of one size, give or take a pixel, row by row; their sides are at most ``tile``."""
    side = TILE_PX if tile is None else tile or max(raster.width, raster.height)
    columns, rows = math.ceil(raster.width / side), math.ceil(raster.height / side)
    if columns * rows > MAX_WINDOWS:
        raise ValueError(
            f"{raster.width} x {raster.height} px are {columns * rows} windows, at most {MAX_WINDOWS} are read; "
            "cut it into several files, or give a larger raster.tile"
        )
    across, down = _edges(raster.width, columns), _edges(raster.height, rows)
    return [Box(left, top, width, height) for top, height in down for left, width in across]


def _edges(length: int, count: int) -> list[tuple[int, int]]:
    """Start and length of ``count`` equal parts of an axis."""
    edges = [length * i // count for i in range(count + 1)]
    return [(start, stop - start) for start, stop in pairwise(edges)]
