"""The images and labels of one split of a data set of the catalog, from its archive, from tables or from the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from glare.data import downloads
from glare.data.catalog import ALL, Entry, HubCopy, Named
from glare.data.layouts import LabelValues, Layout
from glare.data.notices import say_once
from glare.data.pets_study import BUDGETS, PREFIX, is_study, study_split
from glare.data.shards import choose_split, has_shards
from glare.data.tables import load_hub_split, load_shards, picture_columns, picture_file, undecoded
from glare.errors import UserError, first_line
from glare.model_names import is_repo_id
from glare.paths import kind_of, local_path, printable

LABEL_COLUMNS = ("label", "annotation", "mask", "segmentation", "labels", "masks", "trimap")


@dataclass(frozen=True)
class LabelOf:
    """The file of a label, what to call it, and what its values mean."""

    file: Path | BytesIO
    name: str
    values: LabelValues


@dataclass(frozen=True)
class Part:
    """Named images of a split: ``image(index)`` gives the file and ``label(index)`` that of its label.

    Both raise ValueError where the row of a table has none. ``origin``: as that of a `LabelledSet`.
    """

    entry: Entry
    names: list[str]
    image: Callable[[int], Path | BytesIO]
    label: Callable[[int], LabelOf]
    origin: str


def open_part(wanted: Named, split: str | None, *, labelled: bool) -> Part:
    """List a split, and say in one line if it has another number of images than it should.

    Args:
        wanted: the data set and where it is.
        split: train, val or test as far as the data set has them; of oxford_pets also those of `pets_study`.
        labelled: whether the labels are needed.

    Raises:
        UserError: there is no such split or place, it is not laid out as known, or it has no labels and needs them.
    """
    entry = wanted.entry
    split = _checked(entry, split)
    if labelled and split in entry.unlabelled:
        others = " or ".join(name for name in entry.counts if name not in entry.unlabelled)
        raise UserError(f"the labels of {entry.title} {split} are not public; give --split {others}")
    part = _open(wanted, split, labelled=labelled)
    expected = entry.counts.get(split)
    if expected is not None and len(part.names) != expected:
        say_once(f"{wanted}: {split} has {len(part.names):,} images here, {expected:,} in the whole of {entry.title}")
    return part


def _checked(entry: Entry, split: str | None) -> str:
    if split is not None and (split in entry.counts or (entry.study and is_study(split))):
        return split
    study = f", {PREFIX}:test and {PREFIX}:N (N of {', '.join(map(str, BUDGETS))})" if entry.study else ""
    given = "several splits" if split is None else f"no split {split!r}"
    raise UserError(f"{entry.name} has {given}; choose one of {', '.join(entry.counts)}{study}")


def _open(wanted: Named, split: str, *, labelled: bool) -> Part:
    entry, place = wanted.entry, wanted.place
    if place is None:
        if entry.hub is None:
            raise UserError(
                f"{entry.title} has no copy on the Hub that this package knows; get it from {entry.archive} "
                f"({entry.terms}; {entry.page}), unpack it and give --data {entry.name}:FOLDER"
            )
        return _hub(wanted, entry.hub, entry.hub.splits[split], labelled=labelled)
    folder = local_path(place)
    if kind_of(folder) == "folder":
        for layout in entry.layouts:
            root = layout.root(folder, ALL if is_study(split) else split)
            if root is not None:
                return _archive(entry, layout, root, split, labelled=labelled)
        if has_shards(folder):
            return _tables(wanted, folder, split, labelled=labelled)
        raise _misplaced(entry, place, split)
    if "/" in place and is_repo_id(place) and kind_of(folder) is None:
        return _any_hub(wanted, place, split, labelled=labelled)
    raise UserError(
        f"data {str(wanted)!r} names {place!r}, which is no folder; give the folder of the unpacked archive "
        f"({entry.archive}), or of parquet files"
    )


def _misplaced(entry: Entry, place: str, split: str) -> UserError:
    """What to say of a folder that does not hold this split: where it is, if near, or what to unpack."""
    near = (layout.around(local_path(place), ALL if is_study(split) else split) for layout in entry.layouts)
    root = next(filter(None, near), None)
    if root is not None:
        return UserError(
            f"folder {place!r} is not the one that holds the archive of {entry.title}, which is {str(root)!r}; "
            f"give --data {entry.name}:{root}"
        )
    return UserError(
        f"folder {place!r} does not hold {entry.title} {split} as its archive does ({_expected(entry, split)}), "
        f"nor parquet files; unpack {entry.archive} there"
    )


def _expected(entry: Entry, split: str) -> str:
    layouts = (layout.folders.get(ALL if is_study(split) else split, ()) for layout in entry.layouts)
    return ", or ".join(" and ".join(folders) for folders in layouts if folders)


def _archive(entry: Entry, layout: Layout, root: Path, split: str, *, labelled: bool) -> Part:
    """From the unpacked archive."""
    images = study_split(layout.images(root, ALL), split) if is_study(split) else layout.images(root, split)
    if not images:
        raise UserError(f"{str(root)!r} has no images in {_expected(entry, split)}; unpack {entry.archive} there")
    if labelled and not layout.has_labels(root, images[0]):
        expected = " or ".join(str(root / way.of(images[0])) for way in layout.labels)
        raise UserError(
            f"{entry.title} {split} in {str(root)!r} has images without labels, which would be {expected}; "
            "unpack the labels there, too"
        )

    def label(index: int) -> LabelOf:
        file, values = layout.label(root, images[index])
        return LabelOf(file, printable(str(file)), values)

    names = [printable(name) for name in images]
    return Part(entry, names, lambda index: root / images[index], label, str(root.resolve()))


def _hub(wanted: Named, copy: HubCopy, split: str, *, labelled: bool) -> Part:
    """The copy on the Hub that the catalog knows."""
    try:
        rows = load_hub_split(copy.id, copy.config, split)
    except Exception as error:  # no connection, a moved data set, a broken cache, ...
        raise UserError(
            f"the copy of {wanted.entry.title} on the Hub, {copy.id}, cannot be loaded ({first_line(error)}); check "
            f"the connection, or get {wanted.entry.archive} and give --data {wanted.entry.name}:FOLDER"
        ) from error
    return _rows(wanted, rows, copy.image, copy.label if labelled else None, folder=None, split=split)


def _any_hub(wanted: Named, hub_id: str, split: str, *, labelled: bool) -> Part:
    """A data set of the Hub that the user says to be a copy."""
    try:
        splits = downloads.load(hub_id)
    except Exception as error:  # as above
        raise UserError(
            f"data {str(wanted)!r} names {hub_id!r}, neither a folder nor a loadable Hub data set "
            f"({first_line(error)}); check the spelling and the connection"
        ) from error
    rows = splits[choose_split(splits, split, data=str(wanted))]
    return _chosen(wanted, rows, split, labelled=labelled, folder=None)


def _tables(wanted: Named, folder: Path, split: str, *, labelled: bool) -> Part:
    """Parquet files, whose names tell their splits."""
    rows, _ = load_shards(folder, split, data=str(wanted))
    return _chosen(wanted, rows, split, labelled=labelled, folder=folder)


def _chosen(wanted: Named, rows: Any, split: str, *, labelled: bool, folder: Path | None) -> Part:
    """The columns of a table, by their usual names."""
    columns = picture_columns(rows.features)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    image = "image" if "image" in columns else next((name for name in columns if name != label), None)
    if label is None and len(columns) == 2:
        label = next(name for name in columns if name != image)
    if image is None or (labelled and label is None):
        raise UserError(
            f"{wanted} has no column of {'labels' if image else 'images'} among {', '.join(rows.features)}; give "
            f"tables with the pictures 'image' and 'label' (or {', '.join(LABEL_COLUMNS[1:])})"
        )
    return _rows(wanted, rows, image, label if labelled else None, folder=folder, split=split)


def _rows(wanted: Named, rows: Any, image: str, label: str | None, *, folder: Path | None, split: str) -> Part:
    """A part of the rows of a table; without a column of labels it has none. Each split counts its rows from 0."""
    rows = undecoded(rows, [image] if label is None else [image, label])
    names = [f"{index:06d}" for index in range(len(rows))]

    def label_of(index: int) -> LabelOf:
        cell = rows[index][label] if label is not None else None
        if cell is None:
            raise ValueError("the row has no label")
        return LabelOf(picture_file(cell, folder), f"of row {index}", wanted.entry.values)

    origin = f"{wanted if folder is None else folder.resolve()}#{split}"
    return Part(wanted.entry, names, lambda index: picture_file(rows[index][image], folder), label_of, origin)
