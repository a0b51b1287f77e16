"""The shards of a table on this machine: parquet or tar files, and the splits that their names tell."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from glare.data.listing import extension_of, listed, natural
from glare.data.notices import say_once
from glare.data.opening import check_archive, is_zip
from glare.errors import UserError, first_line
from glare.paths import printable

SHARDS = {"parquet": "parquet", "tar": "webdataset"}
"""File extension -> the builder of `datasets` that reads it."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> what tables and folders may call it."""

NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}\.\w+")


def has_shards(folder: Path) -> bool:
    """Whether there are parquet files or tar shards in a folder, at any depth."""
    return next(_shards(folder), None) is not None


def find_shards(place: Path) -> tuple[str, dict[str, list[Path]]]:
    """The builder that reads the shard or the folder of shards, and by split its files.

    A file belongs to the split that `split_of` reads from its name; those that tell none are train, which is said
    where others do. Raises UserError without shards, and for both kinds together.
    """
    files = [place] if place.is_file() else sorted(_shards(place), key=lambda file: natural(file.as_posix()))
    kinds = {extension_of(file.name) for file in files}
    if len(kinds) != 1 or not kinds <= SHARDS.keys():
        found = " and ".join(sorted(kinds & SHARDS.keys())) or "none"
        raise UserError(
            f"data {str(place)!r} has to be files of one kind that end in .{' or .'.join(SHARDS)}; found: {found}"
        )
    told = [split_of(file.name if file == place else file.relative_to(place).as_posix()) for file in files]
    unnamed = [printable(file.name) for file, split in zip(files, told, strict=True) if split is None]
    if 0 < len(unnamed) < len(files):
        say_once(f"of {str(place)!r} the files whose names tell no split are train ({len(unnamed)}: {listed(unnamed)})")
    found_splits: dict[str, list[Path]] = {}
    for file, split in zip(files, told, strict=True):
        found_splits.setdefault(split or "train", []).append(file)
    return SHARDS[kinds.pop()], found_splits


def split_of(name: str) -> str | None:
    """The split that the name of a shard, or of its folder, tells; None where it tells none.

    That is the first word that is a usual name (``val-0.parquet``, ``validation/a.parquet``), else what comes before
    the numbers in ``extra-00000-of-00002.parquet``, as `datasets` writes it.
    """
    words = re.findall("[a-z]+", name.lower())
    usual = (split for word in words for split, others in SPLIT_NAMES.items() if word in others)
    numbered = NUMBERED.fullmatch(name.rpartition("/")[2])
    return next(usual, numbered[1] if numbered else None)


def choose_split(names: Iterable[str], wanted: str | None, *, data: str) -> str:
    """The split of this name, or of another usual name for it; without one train or the only one, which is said.

    Raises UserError where there is none, or several of which none is train.
    """
    there = list(names)
    if wanted is not None:
        same: tuple[str, ...] = next((others for others in SPLIT_NAMES.values() if wanted in others), ())
        chosen = next((name for name in (wanted, *same) if name in there), None)
        if chosen is None:
            raise UserError(f"data {data!r} has no split {wanted!r}; it has {', '.join(there)}")
        return chosen
    if len(there) == 1:
        return there[0]
    usual = next((name for name in SPLIT_NAMES["train"] if name in there), None)
    if usual is None:
        raise UserError(f"data {data!r} has several splits; choose one by --split {', '.join(there)}")
    others = ", ".join(name for name in there if name != usual)
    say_once(f"of {data!r} its split {usual!r} is read; --split takes another one ({others})")
    return usual


def check_shards(files: Iterable[Path]) -> int | None:
    """The number of rows, as far as the shards say it. Raises UserError that names the first that cannot be read."""
    rows: int | None = 0
    for file in files:
        try:
            if extension_of(file.name) == "parquet":
                rows = None if rows is None else rows + pq.read_metadata(file).num_rows
            elif is_zip(file):
                raise ValueError(f"{file.name} is a zip file, whatever its name; unpack it")
            else:
                check_archive(file)
                rows = None
        except Exception as error:  # what their readers let out for a damaged file
            raise UserError(
                f"{printable(str(file))!r} cannot be read ({first_line(error)}); repair it or write it again"
            ) from error
    return rows


def _shards(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if extension_of(file.name) in SHARDS and not hidden and file.is_file():
            yield file
