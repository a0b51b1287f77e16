"""Labelled images: a folder of images, class-index PNGs and classes.json, or generated scenes."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from glare.crops import PackedImages
from glare.data.archives import Part, open_part
from glare.data.cache import PixelStore, Reading, check_short_side, packed_images, shrink
from glare.data.catalog import check_unnamed, named, suggestion
from glare.data.geotiff import Reader
from glare.data.label_files import read_indices
from glare.data.landcover import parse_landcover
from glare.data.listing import image_names
from glare.data.matching import matching
from glare.data.opening import open_picture
from glare.data.raster_windows import AS_NEEDED, RasterReading, file_of, list_parts
from glare.data.raster_windows import Part as Picture
from glare.data.same_files import resolved
from glare.data.shards import SPLIT_NAMES
from glare.data.sources import BadImage, Images, folder_images, split_remedy, splits
from glare.errors import UserError, shortened
from glare.paths import kind_of, local_path, printable

IGNORE_INDEX = 255
MAX_CLASSES = 255  # a label is one byte, and 255 means ignored
LAYOUT = "a labelled folder holds [split/]images/*.jpg, [split/]labels/*.png and classes.json"
EXAMPLE = '{"classes": ["building", "road"], "ignore_index": 255}'
UNPRINTABLE = ("Cc", "Cs")  # of Unicode's categories: control characters and halves of characters
Labelled = tuple[Image.Image, NDArray[np.uint8]]
"""RGB image and class indices (h, w)."""


@dataclass(frozen=True)
class LabelledSet:
    """Named images with class indices; whatever index a data set ignores, it is 255 here.

    ``palette`` (k, 3) uint8 has a colour for each of the k ``classes``. ``origin`` is where the names count from: in
    two sets, the same name below the same origin is the same image; empty where that is not known.
    """

    classes: list[str]
    palette: NDArray[np.uint8]
    names: Sequence[str]
    load: Callable[[int], Labelled]
    ignore_index: int = IGNORE_INDEX
    origin: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What image ``index`` is called: its path in the folder of images."""
        return self.names[index]

    def read(self, index: int) -> Labelled:
        """Image (RGB, 8 bits) and label (h, w) of the same size, 0..k-1 or 255; BadImage if that is impossible."""
        return self.load(index)

    def subset(self, indices: Iterable[int]) -> "LabelledSet":
        """Only the images ``indices``, in that order."""
        kept = list(indices)
        return replace(self, names=[self.names[i] for i in kept], load=lambda index: self.load(kept[index]))

    def shared(self, other: "LabelledSet", *, windows: bool = True) -> int:
        """How many of these images are among those of ``other``, too, links followed.

        ``windows`` of a file are images of their own, unless the sets may cut it in other ways.
        """
        if not (self.origin and other.origin):
            return 0
        mine, theirs = (resolved(part.origin, part.names) for part in (self, other))
        if not windows:
            mine, theirs = ([file_of(name) for name in names] for names in (mine, theirs))
        known = set(theirs)
        return sum(name in known for name in mine)


@dataclass(frozen=True)
class PackedLabelled:
    """Decoded images with their labels.

    ``labels`` (total_pixels,) uint8 is packed like ``images.pixels``, 255 is ignored; ``palette`` (k, 3) uint8;
    ``skipped`` has (name, reason) of the images that could not be used.
    """

    images: PackedImages
    labels: Tensor
    names: list[str]
    classes: list[str]
    palette: NDArray[np.uint8]
    skipped: list[tuple[str, str]]


def open_labelled(
    data: str, *, split: str | None = None, match: str | None = None, raster: RasterReading = AS_NEEDED
) -> LabelledSet:
    """List the labelled images that ``data`` names.

    Args:
        data: a folder with ``[split/]images``, ``[split/]labels`` (PNGs or TIFFs of class indices, named like the
            images) and ``classes.json``, a data set of the catalog (``ade20k``, ``loveda:FOLDER``), or
            ``landcover:<domain>[:count[:seed]]``.
        split: sub-folder of ``data``, or train, val or test of the catalog's; None takes the images of ``data``
            itself, or its only split.
        match: globs on file stems or paths, as of `open_source`.
        raster: how GeoTIFFs are read.

    Raises:
        UserError: there is no such data or split, it is not laid out like this, or ``match`` selects none.
    """
    path = local_path(data)
    if data.partition(":")[0] == "landcover" and kind_of(path) != "folder":
        found = _generated(data, split)
    elif (wanted := named(data)) is not None:
        found = _archived(open_part(wanted, split, labelled=True))
    else:
        found = _folder(_split_folder(path, split), raster)
    return found.subset(matching(found.names, match, data=data))


def default_split(data: str, purpose: str, *, train: str | None = None) -> str | None:
    """The usual split to ``train`` on or to measure on (``val``), by its name in ``data``.

    To measure on, that is ``val``, ``validation``, ``valid`` or ``dev``, then ``test``, unless the folder has images of
    its own; ``train`` is the split that is trained on, where that matters. None in a labelled folder without such.
    """
    wanted = named(data)
    if wanted is not None:
        return wanted.entry.split(purpose, train=train)
    folder = local_path(data)
    usual = SPLIT_NAMES["train" if purpose == "train" else "val"]
    if purpose != "train" and not (folder / "images").is_dir():
        usual += SPLIT_NAMES["test"]
    return next((name for name in usual if (folder / name / "images").is_dir()), None)


def split_for(data: str, purpose: str, *, train: str | None = None) -> str | None:
    """As `default_split`, but in a folder whose images all lie in one split that one, whatever its name."""
    usual = default_split(data, purpose, train=train)
    folder = local_path(data)
    if usual is not None or named(data) is not None or kind_of(folder) != "folder" or (folder / "images").is_dir():
        return usual
    found = splits(folder)
    return found[0] if len(found) == 1 else None


def pack_labelled(
    labelled: LabelledSet,
    *,
    short_side: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> PackedLabelled:
    """Decode all images and labels; the result does not depend on the number of workers.

    Args:
        labelled: what to decode.
        short_side: px to which a longer short side is reduced, images antialiased, labels to the nearest pixel.
        strict: stop at the first image or label that cannot be used instead of skipping it.
        workers: decoding threads, by default one per core up to 8.
        progress: show a progress bar.

    Raises:
        UserError: a bad image or label if ``strict``, or no good one at all.
    """
    check_short_side(short_side)
    names: list[str] = []
    sizes: list[tuple[int, int]] = []

    def read(index: int) -> Labelled:
        image, label = labelled.read(index)
        image = shrink(image, short_side)
        return image, np.asarray(Image.fromarray(label).resize(image.size, Image.Resampling.NEAREST))

    def keep(index: int, pair: Labelled) -> None:
        image, label = pair
        pixels.append(np.asarray(image))
        labels.append(label)
        sizes.append(image.size)
        names.append(labelled.name(index))

    count = len(labelled)
    with PixelStore(channels=3) as pixels, PixelStore(channels=1) as labels:
        reading = Reading(strict=strict, workers=workers, progress=progress)
        skipped = reading.run(read, keep, count=count)
        images = packed_images(pixels, sizes)
        return PackedLabelled(images, labels.finish(), names, labelled.classes, labelled.palette, skipped)


def distinct_colours(count: int) -> NDArray[np.uint8]:
    """``count`` different colours (count, 3), always the same: each far from black, white and those before it."""
    shades = np.linspace(0, 255, 8).round()
    grid = np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = np.minimum((grid**2).sum(axis=1), ((grid - 255) ** 2).sum(axis=1))
    chosen: list[NDArray[np.float64]] = []
    for _ in range(count):
        chosen.append(grid[distance.argmax()])
        distance = np.minimum(distance, ((grid - chosen[-1]) ** 2).sum(axis=1))
    return np.array(chosen).astype(np.uint8)


def _generated(data: str, split: str | None) -> LabelledSet:
    if split is not None:
        raise UserError(f"{data!r} has no splits, {split!r} was asked for; leave split out and give another seed")
    scenes = parse_landcover(data)
    return LabelledSet(
        classes=list(scenes.classes),
        palette=np.array(scenes.palette, np.uint8),
        names=[scenes.name(i) for i in range(len(scenes))],
        load=scenes.read_labelled,
        origin=f"landcover:{scenes.domain}:{scenes.seed}",
    )


def _archived(part: Part) -> LabelledSet:
    images = Images(part.names, lambda index: open_picture(part.image(index)))
    entry = part.entry

    def load(index: int) -> Labelled:
        image = images.read(index)
        try:
            label = part.label(index)
            values = read_indices(label.file, label.name, image.size)
        except ValueError as error:
            raise BadImage(images.name(index), str(error)) from error
        try:
            return image, label.values.indices(values)
        except ValueError as unknown:
            reason = (
                f"its label {label.name} has the values {unknown}; allowed in {entry.title} are {label.values.allowed}"
            )
            raise BadImage(images.name(index), f"{reason}: give labels of these values") from unknown

    palette = np.array(entry.classes.palette, np.uint8)
    return LabelledSet(list(entry.classes.names), palette, images.names, load, origin=part.origin)


def _split_folder(data: Path, split: str | None) -> Path:
    """The folder that holds images and labels."""
    if kind_of(data) != "folder":
        raise UserError(f"labelled data {str(data)!r} is not a folder{suggestion(str(data))}; {LAYOUT}")
    if not (data / "classes.json").is_file():
        check_unnamed(data, otherwise=f"arrange it so that {LAYOUT}")
    found = splits(data)
    if split is not None:
        if split not in found:
            others = split_remedy(data, split, found)
            raise UserError(f"labelled data {str(data)!r} has no split {split!r}; {others} ({LAYOUT})")
        return data / split
    if (data / "images").is_dir():
        return data
    if len(found) > 1:
        raise UserError(f"labelled data {str(data)!r} has several splits; choose one of {', '.join(found)}")
    if not found:
        raise UserError(f"labelled data {str(data)!r} has no folder of images; {LAYOUT}")
    return data / found[0]


def _folder(folder: Path, raster: RasterReading) -> LabelledSet:
    names = image_names(folder / "images", labels=True)
    if not names:
        raise UserError(f"folder {str(folder / 'images')!r} holds no images; {LAYOUT}")
    parts = list_parts(folder / "images", names, raster)
    images = folder_images(parts)
    classes, palette, ignore = _read_classes(folder)
    reader = Reader()  # of its own, so that the images' stays at its file

    def load(index: int) -> Labelled:
        image = images.read(index)
        try:
            return image, _read_label(parts[index], folder, image.size, reader, num_classes=len(classes), ignore=ignore)
        except ValueError as error:
            raise BadImage(images.name(index), str(error)) from error

    return LabelledSet(classes, palette, images.names, load, origin=str((folder / "images").resolve()))


def _read_label(
    part: Picture, folder: Path, size: tuple[int, int], reader: Reader, *, num_classes: int, ignore: int
) -> NDArray[np.uint8]:
    """Class indices (h, w) with 255 for ``ignore``; ValueError says what is wrong with the file."""
    file = part.label_file(folder / "images", folder / "labels")
    name = printable(str(file))
    values = part.read_classes(file, size, reader, num_classes=num_classes, ignore=ignore)
    ignored = values == ignore
    unknown = np.unique(values[~ignored & ((values < 0) | (values >= num_classes))])
    if unknown.size:
        listed = ", ".join(map(str, unknown[:8])) + (", ..." if unknown.size > 8 else "")
        raise ValueError(
            f"its label {name} has the values {listed}; allowed are 0 to {num_classes - 1} and {ignore} to ignore: "
            "correct the label, or the classes in classes.json"
        )
    return np.where(ignored, IGNORE_INDEX, values).astype(np.uint8)


def _read_classes(folder: Path) -> tuple[list[str], NDArray[np.uint8], int]:
    """Class names, palette and ignored value from classes.json in ``folder`` or above it."""
    file = next((f for f in (folder / "classes.json", folder.parent / "classes.json") if f.is_file()), None)
    if file is None:
        raise UserError(f"{str(folder)!r} has no classes.json, nor has the folder above; write one such as {EXAMPLE}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        classes, ignore = content["classes"], content.get("ignore_index", IGNORE_INDEX)
        palette = content.get("palette")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shortened(repr(error))
        raise UserError(f"{str(file)!r} has no list of classes ({reason}); write one such as {EXAMPLE}") from error
    _check_classes(file, classes, ignore)
    return classes, distinct_colours(len(classes)) if palette is None else _colours(file, palette, len(classes)), ignore


def _check_classes(file: Path, classes: Any, ignore: Any) -> None:
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not names or not 0 < len(set(classes)) == len(classes) <= MAX_CLASSES:
        raise UserError(f"classes in {str(file)!r} must be 1 to {MAX_CLASSES} different names, such as {EXAMPLE}")
    unfit = [name for name in classes if not name.strip() or any(category(letter) in UNPRINTABLE for letter in name)]
    if unfit:
        raise UserError(
            f"classes in {str(file)!r} has the name {shortened(unfit[0])!r}, which cannot be shown; "
            "give names without control characters"
        )
    if type(ignore) is not int:
        given = shortened(repr(ignore))
        raise UserError(f"ignore_index in {str(file)!r} is {given}; give the value that means no class, such as 255")


def _colours(file: Path, palette: Any, count: int) -> NDArray[np.uint8]:
    try:
        colours = np.array(palette)
    except ValueError:
        colours = np.empty(0)
    if colours.shape != (count, 3) or colours.dtype.kind != "i" or colours.min() < 0 or colours.max() > 255:
        raise UserError(f"palette in {str(file)!r} must have [red, green, blue] of 0..255 for each of {count} classes")
    return colours.astype(np.uint8)
