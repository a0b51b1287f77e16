"""The image files of a folder, however many, deep and linked they are: names alone, in natural order."""

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from glare.data.label_names import IMAGES, are_labels_of, label_files, label_folders
from glare.data.notices import say_once
from glare.errors import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "jp2")
NUMBER = re.compile(r"\d+")
MOST_NAMES = 5  # that one line lists


def image_files(folder: Path) -> list[Path]:
    """The image files below ``folder``, as ``image_names`` lists them."""
    return [folder / name for name in image_names(folder)]


def image_names(folder: Path, *, labels: bool = False) -> list[str]:
    """Paths relative to ``folder``, with slashes, of the image files below it, in natural order.

    Each linked folder counts once, and a link to a folder that holds ``folder`` is not followed. Hidden files and
    folders are left out, and in a folder with ``images`` and ``labels`` all but ``images``. Unless ``labels`` are
    wanted, too, other folders that are called like ones of labels are left out where images of the same names lie
    beside them, and so are files that are called like the labels of their neighbours (see `label_names`). What is left
    out is said, but for ``labels`` beside ``images``. What is named like an image is listed as it is; whether it can be
    read shows when it is. Raises UserError for a folder that cannot be listed.
    """
    walk = _Walk(folder, labels, seen={_identity(above) for above in folder.resolve().parents})
    pending = [""]
    while pending:
        walk.through(pending)
        doubtful, walk.doubtful = walk.doubtful, []
        found = sorted(walk.found)
        for name in doubtful:  # all of them before any is walked through
            if walk.labels_neighbours(name, found):
                walk.labels.append(name)
            else:
                pending.append(f"{name}/")
    for line in walk.left_out():
        say_once(line)
    return sorted(walk.found, key=natural)


@dataclass
class _Walk:
    """What is known of ``folder`` so far; all names are paths in it, those of folders that are walked end in a slash.

    ``wanted``: whether labels are. ``doubtful``: folders that hold labels if images of their names lie beside them.
    ``labels``, ``endings`` (of files, and how many) and ``others`` are left out, the last for no name of theirs.
    """

    folder: Path
    wanted: bool
    seen: set[tuple[int, int]]
    found: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)

    def through(self, pending: list[str]) -> None:
        """Walk through the folders ``pending``, the last first, and all below that are not doubtful."""
        while pending:
            prefix = pending.pop()
            try:
                here = _identity(self.folder / prefix)
                if here in self.seen:
                    continue
                folders, files = _entries(self.folder / prefix)
            except OSError as error:
                raise UserError(
                    f"folder {error.filename!r} cannot be listed ({error.strerror}); make it readable or move it away"
                ) from None
            self.seen.add(here)
            folders, files = self._chosen(prefix, folders, files)
            self.found += [prefix + name for name in files]
            pending += [f"{prefix}{name}/" for name in sorted(folders, reverse=True)]

    def labels_neighbours(self, name: str, found: list[str]) -> bool:
        """Whether half of the pictures of the folder ``name`` are called like one beside it; ``found`` is sorted."""
        above = _above(name)
        end = bisect_left(found, f"{above[:-1]}0") if above else len(found)  # 0 comes after the slash
        beside = found[bisect_left(found, above) : end]
        if not beside:
            return False
        inside = _Walk(self.folder / name, wanted=True, seen=set(self.seen))
        inside.through([""])
        return are_labels_of(inside.found, beside)

    def _chosen(self, prefix: str, folders: list[str], files: list[str]) -> tuple[list[str], list[str]]:
        """The folders and files at ``prefix`` that are taken for images."""
        if {"images", "labels"} <= set(folders):
            self.others += [f"{prefix}{name}" for name in sorted(folders) if name not in ("images", "labels")]
            self.others += [f"{len(files)} pictures beside {prefix}images"] if files else []
            return ["images"], []
        if self.wanted:
            return folders, files
        labels = label_folders(folders)
        beside_images = not IMAGES.isdisjoint(name.lower() for name in folders)
        (self.labels if beside_images else self.doubtful).extend(prefix + name for name in labels)
        named = label_files(files)
        self.endings.update({ending: len(names) for ending, names in named.items()})
        aside = {name for names in named.values() for name in names}
        return [name for name in folders if name not in labels], [name for name in files if name not in aside]

    def left_out(self) -> Iterator[str]:
        """One line on each kind of what is left out."""
        place = repr(str(self.folder))
        if self.labels:
            yield f"{listed(self.labels)} of {place} left out as labels by the name"
        for ending, count in self.endings.items():
            yield f"{count} files *{ending}.* of {place} left out as labels of the pictures beside them, by the name"
        if self.others:
            yield f"{listed(self.others)} of {place} left out: beside labels only images is taken"


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _above(name: str) -> str:
    """The folder that holds what is called so, with a slash; the first of all is empty."""
    return name[: name.rfind("/") + 1]


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
