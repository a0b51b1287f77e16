"""How archives lie on disk: where the images of a split are, which label belongs to which, what its values mean."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glare.data.listing import image_names
from glare.errors import UserError, shortened
from glare.paths import kind_of

IGNORED = 255
LISTED_NAME = re.compile(r"\w[\w.-]*")
"""What may stand in a list of images: a name without folders, so that no list leads out of its archive."""
MAX_LIST_BYTES = 2**24
NEAR = 5
"""Levels above a folder where the archive that it is a part of may begin."""


@dataclass(frozen=True)
class LabelValues:
    """What the values of a label mean: ``classes`` value -> class index, and the values that count nowhere.

    ``name``: what they are called, where a data set has several such numbers.
    """

    classes: Mapping[int, int]
    ignored: frozenset[int] = frozenset()
    name: str = ""

    @property
    def allowed(self) -> str:
        """The values, such as ``0 to 18 and 255``, with what they are called."""
        values = sorted({*self.classes, *self.ignored})
        starts = [v for v in values if v - 1 not in values]
        ends = [v for v in values if v + 1 not in values]
        runs = [f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True)]
        listed = " and ".join(filter(None, (", ".join(runs[:-1]), runs[-1])))
        return f"{self.name} {listed}" if self.name else listed

    def indices(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Class indices, 255 for what is ignored, of values of any shape. Raises ValueError that lists all others."""
        table = np.full(256, -1, np.int64)
        table[list(self.classes)] = list(self.classes.values())
        table[list(self.ignored)] = IGNORED
        inside = (values >= 0) & (values < 256)
        found = np.where(inside, table[np.where(inside, values, 0)], -1)
        if (found < 0).any():
            unknown = np.unique(values[found < 0])
            raise ValueError(", ".join(map(str, unknown[:8])) + (", ..." if unknown.size > 8 else ""))
        return found.astype(np.uint8)


def counted(classes: int, *, first: int = 0, ignored: tuple[int, ...] = ()) -> LabelValues:
    """The values ``first``, ``first + 1``, ... for the classes 0, 1, ..."""
    return LabelValues({first + k: k for k in range(classes)}, frozenset(ignored))


@dataclass(frozen=True)
class LabelFile:
    """Which file has the label of an image: the image's path with ``swaps`` made in order, each once, as PNG."""

    swaps: tuple[tuple[str, str], ...]
    values: LabelValues

    def of(self, image: str) -> str:
        """Path of the label, relative to the archive, as ``image`` is."""
        for old, new in self.swaps:
            image = image.replace(old, new, 1)
        return f"{image.rpartition('.')[0]}.png"


@dataclass(frozen=True)
class Layout:
    """Paths with slashes, relative to the archive's own folder.

    ``folders``: split -> folders of its images, of any depth, or the one folder of the JPEGs that a file of
    ``lists`` (split -> file) names, the first word of each line. ``labels``: ways to name an image's label, the first
    that is there holds. ``below``: where the archive's own folder may be in the folder a user gives. ``own``: whether
    it is this data set's alone, so that it tells which one it is.
    """

    folders: Mapping[str, tuple[str, ...]]
    labels: tuple[LabelFile, ...]
    lists: Mapping[str, str] = field(default_factory=dict)
    below: tuple[str, ...] = ()
    own: bool = True

    def root(self, folder: Path, split: str) -> Path | None:
        """The archive's own folder in what the user gave, None where no images of this split are."""
        for below in ("", *self.below):
            if any((folder / below / images).is_dir() for images in self.folders.get(split, ())):
                return folder / below
        return None

    def images(self, root: Path, split: str) -> list[str]:
        """Paths of the images of a split, relative to the archive. Raises UserError for a bad list."""
        folders = self.folders[split]
        if split in self.lists:
            return [f"{folders[0]}/{name}.jpg" for name in listed_names(root / self.lists[split])]
        there = [folder for folder in folders if (root / folder).is_dir()]
        return [f"{folder}/{name}" for folder in there for name in image_names(root / folder, labels=True)]

    def label(self, root: Path, image: str) -> tuple[Path, LabelValues]:
        """The label of an image, and what its values mean; the last way to name it where no file is there."""
        for way in self.labels:
            if (root / way.of(image)).is_file():
                break
        return root / way.of(image), way.values

    def has_labels(self, root: Path, image: str) -> bool:
        """Whether there is a folder where the label of this image belongs."""
        return any((root / way.of(image)).parent.is_dir() for way in self.labels)

    def around(self, folder: Path, split: str) -> Path | None:
        """The archive's own folder with images and labels of this split, if ``folder`` is in it or right above it."""
        here = folder.absolute()
        for place in (*here.parents[:NEAR], *sorted(here.glob("*/"))):
            root = self.root(place, split)
            if root is None or not (here.is_relative_to(root) or root.is_relative_to(here)):
                continue
            if any(self.has_labels(root, f"{images}/name.jpg") for images in self.folders[split]):
                return root
        return None

    def tells(self, folder: Path) -> Path | None:
        """The archive's own folder if ``folder``, it or a part of it, holds images and labels laid out like this."""
        if not self.own:
            return None
        here = folder.absolute()
        for root in (here, *(here / below for below in self.below), here.parent):
            for images in (name for folders in self.folders.values() for name in folders):
                pair = (root / images, (root / self.labels[0].of(f"{images}/name.jpg")).parent)
                if all(path.is_dir() and path.is_relative_to(here) for path in pair):
                    return root
        return None


def listed_names(file: Path) -> list[str]:
    """The first word of each line, each once; empty lines and those that begin with # are left out.

    Raises:
        UserError: the file is missing or cannot be read, or a name is none: a list is not to be trusted.
    """
    if kind_of(file) != "file":
        raise UserError(f"the list {str(file)!r} is missing; unpack the whole archive, or write the list")
    if file.stat().st_size > MAX_LIST_BYTES:
        raise UserError(f"the list {str(file)!r} has more than {MAX_LIST_BYTES:,} bytes; give one name a line")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {str(file)!r} cannot be read ({error}); write it again in UTF-8") from None
    names: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        name = line.split(maxsplit=1)[0] if line.strip() else "#"
        if name.startswith("#"):
            continue
        if not LISTED_NAME.fullmatch(name):
            raise UserError(
                f"line {number} of {str(file)!r} names {shortened(name)!r}; allowed are names of images without "
                "folders and without their ending: correct that line"
            )
        names[name] = None
    return list(names)
