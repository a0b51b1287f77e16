"""The images a comparison measures on: the parts of a data set, who trains and who tests, and which belong together."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glare.data.few_shot import drawn
from glare.data.labelled import LabelledSet, default_split, open_labelled, split_for
from glare.data.matching import matching
from glare.data.raster_windows import AS_NEEDED, RasterReading, file_of
from glare.data.sources import splits
from glare.errors import UserError, first_line
from glare.paths import local_path
from glare.splits import Fold, group_of, k_fold, leave_one_group_out, split_folders

SPLITS = ("train", "val")
METADATA = "metadata.csv"
FILE_NAME = "file_name"
DEFAULT_FOLDS = 5


@dataclass(frozen=True)
class Pool:
    """Labelled images of all parts of a data set; ``parts`` has the split each image is from, "" without splits."""

    data: LabelledSet
    parts: list[str]

    def subset(self, indices: Sequence[int]) -> "Pool":
        """Only the images ``indices``, in that order."""
        return Pool(self.data.subset(indices), [self.parts[i] for i in indices])


@dataclass(frozen=True)
class SplitPlan:
    """How images are divided; see ``plan_folds``."""

    val_match: str | None
    group_by: str | None
    folds: int | None
    seeds: int
    seed: int


@dataclass(frozen=True)
class Division:
    """``folds``: for each seed the folds in which every test image is tested once; ``groups`` of the images, None
    where they are not grouped; ``drawn``: whether folds depend on the seed; ``text`` says how it was done.
    """

    folds: list[list[Fold]]
    groups: list[str] | None
    drawn: bool
    text: str


def open_pool(data: str, *, match: str | None, raster: RasterReading = AS_NEEDED) -> Pool:
    """The images of the splits ``train`` and ``val`` of labelled data, or of all of it where it has no such.

    Of a data set of the catalog without val, ``val`` is its test. Beside a val the images in no split are ``train``.
    """
    found = _splits(data)
    sets = [open_labelled(data, split=split, raster=raster) for split in found.values()]
    if any(part.classes != sets[0].classes for part in sets):
        raise UserError(f"train and val of {data!r} have different classes; give both the same classes.json")
    parts = [name for name, part in zip(found, sets, strict=True) for _ in part.names]
    pool = Pool(_joined(sets, list(found)), parts)
    return pool.subset(matching(pool.data.names, match, data=data))


def check_chosen(pool: Pool, plan: SplitPlan, match: str | None, *, data: str) -> None:
    """Raise UserError where images lie in folders of several splits, among which nothing chose."""
    found = split_folders(pool.data.names) if len(set(pool.parts)) == 1 else []
    chosen = plan.val_match or plan.group_by or plan.folds or "/" in (match or "")
    if len(found) > 1 and not chosen:
        used = f"--match '{found[0]}/*,{found[1]}/*' " if len(found) > 2 else ""
        raise UserError(
            f"the images of {data!r} lie in its folders images/{' and images/'.join(found)}, which random folds would "
            f"mix; give {used}--val-match '{found[1]}/*', or --folds {DEFAULT_FOLDS} for such folds"
        )


def _splits(data: str) -> dict[str, str | None]:
    """Part of a pool -> split of ``data``, None for images in no split. UserError for val without one to train on."""
    val, train = default_split(data, "val"), split_for(data, "train")
    if val is None:
        return {"" if default_split(data, "train") is None else "train": train}
    if train is None and not (local_path(data) / "images").is_dir():
        others = ", ".join(name for name in splits(local_path(data)) if name != val)
        raise UserError(
            f"labelled data {data!r} has several splits besides {val!r}: {others}; rename the one to train on to train"
        )
    return {"val": val} if train == val else {"train": train, "val": val}


def sample(pool: Pool, count: int, *, seed: int) -> Pool:
    """At most ``count`` images of each part, in their order."""
    kept: list[int] = []
    for part in dict.fromkeys(pool.parts):
        own = [i for i, name in enumerate(pool.parts) if name == part]
        kept += [own[i] for i in drawn(len(own), seed=seed, num_images=min(count, len(own)))]
    return pool.subset(sorted(kept))


def divide(pool: Pool, plan: SplitPlan, *, data: str) -> Division:
    """Who trains and who tests.

    In this order: groups, where images are grouped, each tested by what the others train; ``folds`` random parts;
    the images of ``val_match`` tested by the others; the given train and val; five random parts. With groups or
    folds ``val_match`` selects which of the images are tested; all train.
    """
    count = len(pool.data)
    everything = list(range(count))
    chosen = matching(pool.data.names, plan.val_match, data=data) if plan.val_match else everything
    tested = set(chosen)
    if plan.group_by is not None:
        groups = groups_of(pool, plan.group_by, data=data)
        folds = _testing(leave_one_group_out(groups), tested)
        return Division([folds], groups, False, f"leave one group out, {len(folds)} groups by {plan.group_by!r}")
    if plan.folds is None and plan.val_match is not None:
        if len(chosen) == count:
            raise UserError(f"val_match {plan.val_match!r} leaves no image of {data!r} to train on; select fewer")
        fold = Fold([i for i in everything if i not in tested], chosen)
        return Division([[fold]], None, False, f"measured on {plan.val_match}, trained on the rest")
    given = [[i for i in everything if pool.parts[i] == name] for name in SPLITS]
    if plan.folds is None and all(given):
        return Division([[Fold(*given)]], None, False, "the given train and val")
    number = plan.folds or min(DEFAULT_FOLDS, count)
    drawn = [_testing(k_fold(count, number, seed=plan.seed + seed), tested) for seed in range(plan.seeds)]
    return Division(drawn, None, True, f"{number} random folds, drawn {plan.seeds} times")


def _testing(folds: list[Fold], chosen: set[int]) -> list[Fold]:
    """The folds with only ``chosen`` images tested, those that then test none left out."""
    tests = [[image for image in fold.test if image in chosen] for fold in folds]
    return [replace(fold, test=test) for fold, test in zip(folds, tests, strict=True) if test]


def groups_of(pool: Pool, group_by: str, *, data: str) -> list[str]:
    """The group of each image: a column of ``metadata.csv``, or by its file name as in ``splits.group_of``."""
    found = _splits(data)
    folders = {part: local_path(data) / (found.get(part) or "") for part in dict.fromkeys(pool.parts)}
    tables = {part: table for part, folder in folders.items() if (table := _read_column(folder, group_by)) is not None}
    if len(tables) < len(folders):
        return [group_of(name, group_by) for name in pool.data.names]
    return [_look_up(tables[part], name, group_by) for part, name in zip(pool.parts, pool.data.names, strict=True)]


def _read_column(folder: Path, column: str) -> dict[str, str] | None:
    """File name -> value of a column of the folder's metadata.csv; None without the file or the column."""
    file = next((f for f in (folder / METADATA, folder / "images" / METADATA) if f.is_file()), None)
    if file is None:
        return None
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); write it again as CSV in UTF-8") from None
    if not rows or column not in rows[0] or FILE_NAME not in rows[0]:
        return None
    short = next((number for number, row in enumerate(rows, start=2) if None in (row[FILE_NAME], row[column])), None)
    if short is not None:
        raise UserError(f"row {short} of {file} has no {FILE_NAME} or no {column}; complete it")
    return {row[FILE_NAME]: row[column] for row in rows}


def _look_up(table: dict[str, str], name: str, column: str) -> str:
    file = next((found for found in (name, file_of(name)) if found in table), file_of(Path(name).name))
    if file not in table:
        raise UserError(f"{METADATA} has no line for {name!r}, so its {column!r} is not known; add one")
    return table[file]


def _joined(sets: list[LabelledSet], splits: list[str]) -> LabelledSet:
    """Several labelled sets as one; names get the split in front."""
    if len(sets) == 1:
        return sets[0]
    names = [f"{split}/{name}" for split, part in zip(splits, sets, strict=True) for name in part.names]
    place = [(number, index) for number, part in enumerate(sets) for index in range(len(part))]
    return replace(sets[0], names=names, origin="", load=lambda index: sets[place[index][0]].read(place[index][1]))
