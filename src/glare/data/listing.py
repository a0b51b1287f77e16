"""The image files of a folder, however many, deep and linked they are: names alone, in natural order."""

import os
import re
from pathlib import Path

from glare.data.notices import say_once
from glare.errors import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "jp2")
IMAGES = frozenset(["images", "image", "imgs", "img", "img_dir", "images_png", "jpegimages", "leftimg8bit", "rgb"])
LABELS = frozenset(
    [
        "labels",
        "label",
        "masks",
        "mask",
        "annotations",
        "annotation",
        "ann_dir",
        "masks_png",
        "annots",
        "gt",
        "gtfine",
        "groundtruth",
        "ground_truth",
        "trimaps",
        "segmentation",
        "segmentationclass",
        "segmentationclasscontext",
        "segmentationobject",
    ]
)
"""Names of folders, in small letters, that hold labels where one of ``IMAGES`` lies beside them."""
NUMBER = re.compile(r"\d+")


def image_files(folder: Path) -> list[Path]:
    """The image files below ``folder``, as ``image_names`` lists them."""
    return [folder / name for name in image_names(folder)]


def image_names(folder: Path) -> list[str]:
    """Paths relative to ``folder``, with slashes, of the image files below it, in natural order.

    Each linked folder counts once, and a link to a folder that holds ``folder`` is not followed. Hidden files and
    folders are left out, and in a folder with ``images`` and ``labels`` all but ``images``. Other folders that are
    called like ones of labels and lie beside one of images are left out, too, which is said. What is named like an
    image is listed as it is; whether it can be read shows when it is. Raises UserError for a folder that cannot be
    listed.
    """
    found: list[str] = []
    seen = {_identity(above) for above in folder.resolve().parents}
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            here = _identity(folder / prefix)
            if here in seen:
                continue
            folders, files = _entries(folder / prefix)
        except OSError as error:
            raise UserError(
                f"folder {error.filename!r} cannot be listed ({error.strerror}); make it readable or move it away"
            ) from None
        seen.add(here)
        if {"images", "labels"} <= set(folders):
            folders, files = ["images"], []
        elif labels := _of_labels(folders):
            say_once(f"{', '.join(prefix + name for name in labels)} of {str(folder)!r} left out as labels by the name")
            folders = [name for name in folders if name not in labels]
        found += [prefix + name for name in files]
        pending += [f"{prefix}{name}/" for name in sorted(folders, reverse=True)]
    return sorted(found, key=natural)


def _of_labels(folders: list[str]) -> list[str]:
    """Those of the neighbouring ``folders`` that hold labels by their names."""
    known = {name.lower() for name in folders}
    return sorted(name for name in folders if name.lower() in LABELS) if known & IMAGES else []


def natural(name: str) -> tuple[str, str]:
    """Sort key that puts tile2 before tile10."""
    return NUMBER.sub(_by_length, name), name


def extension_of(name: str) -> str:
    """``png`` for a.PNG."""
    return name.rpartition(".")[2].lower()


def _by_length(digits: re.Match[str]) -> str:
    """Digits that sort by value: a null byte, which no name holds, then their number, then they themselves."""
    value = digits[0].lstrip("0")
    return f"\0{chr(len(value))}{value}"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the image files in a folder, without those that are hidden."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(entry.name)
            elif extension_of(entry.name) in EXTENSIONS:
                files.append(entry.name)
    return folders, files


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
