"""What a set of images holds, found in one pass over all of them: sizes, colour modes, near-duplicates, labels."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glare.data.cache import Reading
from glare.data.catalog import named
from glare.data.labelled import IGNORE_INDEX, LabelledSet, default_split, open_labelled
from glare.data.notices import quietly
from glare.data.raster_windows import AS_NEEDED, RasterReading
from glare.data.sources import BadImage, Images, split_folder
from glare.errors import UserError
from glare.near_duplicates import Twin, repeats, thumbnail, twins
from glare.paths import local_path

MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
    "I": "grey 32 bit",
    "F": "grey floating point",
}
"""Pillow's mode -> what it says about a file, of 8 bits unless said; 16 bits are found apart."""

TRAIN = "train"


@dataclass(frozen=True)
class Pair:
    """Image ``name`` shows what ``other`` shows; ``difference`` of their thumbnails, 0 for equal ones."""

    name: str
    other: str
    difference: float


@dataclass(frozen=True)
class Labels:
    """What the labels of one split hold.

    ``pixels`` and ``images`` by class name, how many have the class; ``ignored`` pixels; ``unusable`` (name, reason)
    of labels that cannot be read or do not fit their image.
    """

    split: str
    pixels: dict[str, int]
    images: dict[str, int]
    ignored: int
    unusable: list[tuple[str, str]]


@dataclass(frozen=True)
class DataCheck:
    """What was found in the images that can be used, and (name, reason) of the ``unreadable`` others.

    ``sizes`` (width, height) in px of each of ``names``, upright; ``modes`` number of images by colour mode and bit
    depth; ``splits`` number of images by split, empty unless ``train`` is one of several; ``repeated`` images of
    which an earlier one of the same split is a near-duplicate; ``leaked`` images of other splits of which ``train``
    has a near-duplicate; ``labels`` of each split of a labelled folder.
    """

    names: list[str]
    sizes: list[tuple[int, int]]
    modes: dict[str, int]
    unreadable: list[tuple[str, str]]
    splits: dict[str, int]
    repeated: list[Pair]
    leaked: list[Pair]
    labels: list[Labels]


@dataclass(frozen=True)
class _Measured:
    """One image: size, mode, small grey picture, and pixels by class index (256,) or why there are none."""

    size: tuple[int, int]
    mode: str
    small: NDArray[np.uint8]
    counts: NDArray[np.int64] | None = None
    bad_label: str = ""


@dataclass
class _Tally:
    """The labels of one split, added up by class index."""

    classes: list[str] = field(default_factory=list)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    unusable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, measured: _Measured) -> None:
        if measured.counts is None:
            self.unusable.append((name, measured.bad_label))
        else:
            self.pixels += measured.counts
            self.images += measured.counts > 0

    def labels(self, split: str) -> Labels:
        pixels, images = (dict(zip(self.classes, c.tolist(), strict=False)) for c in (self.pixels, self.images))
        return Labels(split, pixels, images, int(self.pixels[IGNORE_INDEX]), self.unusable)


def check_data(
    source: Images,
    data: str,
    *,
    split: str | None = None,
    short_side: int | None,
    workers: int | None = None,
    progress: bool = False,
    raster: RasterReading = AS_NEEDED,
) -> DataCheck:
    """Read all images once, and their labels where ``data`` is a labelled folder; only thumbnails stay in memory.

    Args:
        source: the images that ``data`` names, or some of them.
        data: where they come from.
        split: the only part of ``data`` that they come from, as of `open_source`.
        short_side: px to which training reduces a longer short side, so that no larger image need be decoded.
        workers: decoding threads, by default one per core up to 8.
        progress: show a progress bar.
        raster: how GeoTIFFs are read.

    Raises:
        UserError: not one image can be read.
    """
    tallies, labelled = _label_sets(data, split, raster)
    names: list[str] = []
    kept: list[_Measured] = []

    def read(index: int) -> _Measured:
        entry = labelled.get(source.name(index))
        return _measure(source, index, short_side) if entry is None else _measure_labelled(source, index, *entry)

    def keep(index: int, measured: _Measured) -> None:
        names.append(source.name(index))
        kept.append(_Measured(measured.size, measured.mode, measured.small))
        if names[-1] in labelled:
            tallies[split_of(names[-1])].add(names[-1], measured)

    unreadable = Reading(strict=False, workers=workers, progress=progress).run(read, keep, count=len(source))
    splits = Counter(split_of(name) for name in names)
    repeated, leaked = _near_duplicates(names, np.stack([measured.small for measured in kept]))
    return DataCheck(
        names=names,
        sizes=[measured.size for measured in kept],
        modes=dict(Counter(measured.mode for measured in kept).most_common()),
        unreadable=unreadable,
        splits=dict(splits) if TRAIN in splits and len(splits) > 1 else {},
        repeated=repeated,
        leaked=leaked,
        labels=[tally.labels(split) for split, tally in tallies.items() if tally.pixels.any() or tally.unusable],
    )


def split_of(name: str) -> str:
    """``train`` for train/images/a.jpg; empty for an image that lies in no split."""
    split, images, _ = name.partition("/images/")
    return split if images else ""


def _label_sets(
    data: str, split: str | None, raster: RasterReading
) -> tuple[dict[str, _Tally], dict[str, tuple[LabelledSet, int]]]:
    """An empty tally for each labelled split of a folder; and set and index of each labelled image, by its name."""
    if named(data) is not None:
        return _archive_labels(data, split)
    folder = split_folder(local_path(data), split)
    tallies: dict[str, _Tally] = {}
    labelled: dict[str, tuple[LabelledSet, int]] = {}
    for part in [folder] if _has_labels(folder) else sorted(folder.glob("*")):
        name = "" if part == folder else part.name
        if not _has_labels(part):
            continue
        try:
            with quietly():
                found = open_labelled(str(folder), split=name or None, raster=raster)
        except UserError as error:
            tallies[name] = _Tally(unusable=[(str(part / "labels"), str(error))])
            continue
        tallies[name] = _Tally(found.classes)
        place = (part / "images").relative_to(folder).as_posix()
        labelled |= {f"{place}/{name}": (found, index) for index, name in enumerate(found.names)}
    return tallies, labelled


def _archive_labels(data: str, split: str | None) -> tuple[dict[str, _Tally], dict[str, tuple[LabelledSet, int]]]:
    """As `_label_sets`, of a split of a data set of the catalog, train for None; nothing where it has only images."""
    try:
        found = open_labelled(data, split=split or default_split(data, TRAIN))
    except UserError:
        return {}, {}
    return {"": _Tally(found.classes)}, {name: (found, index) for index, name in enumerate(found.names)}


def _has_labels(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()


def _measure(source: Images, index: int, short_side: int | None) -> _Measured:
    """An image alone, decoded as training will decode it; BadImage if that is impossible."""
    opened: list[tuple[int, int, str]] = []
    raster = source.raster(index)

    def open_image(index: int) -> Image.Image:
        image = source.open_image(index)
        opened.append((*image.size, raster.form if raster else _mode(image)))
        return image

    picture = Images(source.names, open_image).read(index, short_side=short_side)
    width, height, mode = opened[-1]
    # by the Exif orientation, if the format has not undone it
    turned = (width - height) * (picture.width - picture.height) < 0
    return _Measured((height, width) if turned else (width, height), mode, thumbnail(picture))


def _measure_labelled(source: Images, index: int, labelled: LabelledSet, place: int) -> _Measured:
    """An image and its label; BadImage if the image cannot be read."""
    try:
        image, label = labelled.read(place)
    except BadImage as bad:
        measured = _measure(source, index, None)
        return _Measured(measured.size, measured.mode, measured.small, bad_label=bad.reason)
    if raster := source.raster(index):
        mode = raster.form
    else:
        with source.open_image(index) as file:
            mode = _mode(file)
    return _Measured(image.size, mode, thumbnail(image), np.bincount(label.ravel(), minlength=256))


def _mode(image: Image.Image) -> str:
    """Colour mode and bit depth of an opened file."""
    raw = str(getattr(image, "tile", ""))
    if image.mode.startswith("I;16"):
        return "grey 16 bit"
    return MODES.get(image.mode, image.mode) + (" 16 bit" if ";16" in raw else "")


def _near_duplicates(names: list[str], small: NDArray[np.uint8]) -> tuple[list[Pair], list[Pair]]:
    """Near-duplicates within each split, and those of other splits in train; without a split train, all is one."""
    splits = np.array([split_of(name) for name in names])
    if TRAIN not in splits:
        splits[:] = ""
    train = np.flatnonzero(splits == TRAIN)
    repeated, leaked = [], []
    for split in dict.fromkeys(splits.tolist()):
        own = np.flatnonzero(splits == split)
        repeated += _pairs(repeats(small[own]), names, own, own)
        if len(train) and split != TRAIN:
            leaked += _pairs(twins(small[own], small[train]), names, own, train)
    return repeated, leaked


def _pairs(found: list[Twin], names: list[str], own: NDArray[np.int64], others: NDArray[np.int64]) -> list[Pair]:
    return [Pair(names[own[twin.index]], names[others[twin.other]], twin.difference) for twin in found]
