"""The images of a fine-tuning run: what to train on, what to evaluate on, and whether both are fit for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from glare.data.catalog import named
from glare.data.few_shot import drawn
from glare.data.labelled import IGNORE_INDEX, LabelledSet, PackedLabelled, open_labelled, split_for
from glare.data.landcover import parse_landcover
from glare.data.notices import say_once
from glare.data.pets_study import STUDY_TEST, is_study
from glare.data.sources import BadImage
from glare.errors import UserError
from glare.splits import split_folders

PIECE = 2**24  # pixels that are counted at once
MOST_NAMES = 10


def open_data(recipe: Any) -> tuple[LabelledSet, LabelledSet | None]:
    """What to train on and, where there is a part for it, what to evaluate on.

    Args:
        recipe: a `FinetuneRecipe`.

    Raises:
        UserError: the parts have different classes or share images, images to train on lie in folders of several
            splits, or nothing of what to evaluate on can be read.
    """
    train, trained = open_train(recipe), train_split(recipe)
    _check_chosen(train, recipe)
    if recipe.train_split is None and trained not in (None, "train"):
        say_once(f"trains on the split {trained!r} of {recipe.data!r}; --train-split takes another one")
    data, val_split = val_part(recipe)
    asked = (recipe.val_data, recipe.val_split, recipe.val_match) != (None, None, None)
    if not asked and val_split in (None, trained):
        if recipe.eval_every is not None:
            raise UserError("eval_every needs a validation part: give --val-split, --val-match or --val-data")
        return train, None
    val = open_labelled(data, split=val_split, match=recipe.val_match, raster=recipe.raster)
    if val.classes != train.classes:
        raise UserError(
            f"the classes differ: the training data has {', '.join(train.classes)}, the validation data has "
            f"{', '.join(val.classes)}; give data of the same classes, in the same order"
        )
    shared = val.shared(train)
    if shared:
        raise UserError(
            f"{shared:,} of the {len(val):,} images to evaluate on are among those to train on; {_apart(recipe)}"
        )
    _check_readable(val, strict=recipe.strict)
    return train, val


def _check_chosen(train: LabelledSet, recipe: Any) -> None:
    """Raise UserError where images lie in folders of several splits, and no glob on folders chose among them."""
    found = split_folders(train.names)
    if len(found) > 1 and "/" not in (recipe.match or ""):
        measured = "" if recipe.val_data or recipe.val_split else f" --val-match '{found[1]}/*'"
        raise UserError(
            f"the images of {recipe.data!r} lie in its folders images/{' and images/'.join(found)}, which would all "
            f"train; give --match '{found[0]}/*'{measured}"
        )


def open_train(part: Any) -> LabelledSet:
    """The images to train on: ``part`` has ``data``, ``train_split``, ``match``, ``raster`` and what `drawn` takes."""
    train = open_labelled(part.data, split=train_split(part), match=part.match, raster=part.raster)
    return train.subset(drawn(len(train), seed=part.seed, fraction=part.fraction, num_images=part.num_images))


def train_split(part: Any) -> str | None:
    """The split to train on, None for images in no split."""
    split: str | None = part.train_split
    return split or split_for(part.data, "train")


def val_part(recipe: Any) -> tuple[str, str | None]:
    """Data and split to evaluate on."""
    data: str = recipe.val_data or recipe.data
    trained = train_split(recipe)
    split: str | None = recipe.val_split or split_for(data, "val", train=trained)
    return data, trained if split is None and recipe.val_data is None else split


def _apart(recipe: Any) -> str:
    """What to give instead of a validation part that shares images with the training part."""
    data, split = val_part(recipe)
    unwanted = [pattern.strip() for pattern in (recipe.val_match or "").split(",") if pattern.strip()]
    wanted, trained = named(data), train_split(recipe)
    if unwanted and not any(pattern.startswith("!") for pattern in unwanted):
        kept = ",".join([*([recipe.match] if recipe.match else []), *(f"!{pattern}" for pattern in unwanted)])
        return f"give --match {kept!r}, which leaves them out of training"
    if wanted is not None and wanted.entry.study and (is_study(trained or "") or is_study(split or "")):
        if is_study(trained or ""):
            return f"give --val-split {STUDY_TEST}, whose images are in no part of the study that trains"
        return f"with --val-split {STUDY_TEST} give a --train-split of the study, too, such as study:250"
    if wanted is None and data.startswith("landcover:"):
        scenes = parse_landcover(data)
        return f"give scenes of another seed: --val-data landcover:{scenes.domain}:{len(scenes)}:{scenes.seed + 1}"
    return "give others by --val-split, --val-data, or --match and --val-match that exclude each other"


def _check_readable(val: LabelledSet, *, strict: bool) -> None:
    """Raise UserError if no image to evaluate on can be used with its label; mostly the first one can."""
    first: BadImage | None = None
    for index in range(len(val)):
        try:
            val.read(index)
            return
        except BadImage as bad:
            if strict:
                raise UserError(f"{bad}; repair or remove it, or leave --strict out to skip it") from None
            first = first or bad
    assert first is not None  # no set is empty
    raise unusable(len(val), first.name, first.reason)


def unusable(count: int, name: str, reason: str) -> UserError:
    """What to say where none of ``count`` images can be evaluated on, ``name`` for a ``reason``, for example."""
    return UserError(f"none of the {count:,} images to evaluate on can be used; {name}, for example: {reason}")


def absent_classes(packed: PackedLabelled) -> list[str]:
    """The classes that no pixel is labelled with. Raises UserError where all pixels are of one class or ignored."""
    counts = torch.zeros(IGNORE_INDEX + 1, dtype=torch.int64)
    for piece in packed.labels.split(PIECE):
        counts += torch.from_numpy(np.bincount(piece.numpy(), minlength=len(counts)))
    present = [name for name, count in zip(packed.classes, counts.tolist(), strict=False) if count]
    if len(present) < 2 and counts[IGNORE_INDEX]:
        held = f"no class but {present[0]!r}" if present else "no class"
        raise UserError(
            f"the labels of the {len(packed.names):,} images to train on hold {held}, all else is ignored; 255 means "
            "ignored: write 1 for the class, or set ignore_index in classes.json"
        )
    return [name for name in packed.classes if name not in present]


def absent_line(absent: Sequence[str], classes: int) -> str:
    """One line about `absent_classes`."""
    more = ", ..." if len(absent) > MOST_NAMES else ""
    return f"no pixel is labelled with {len(absent)} of {classes} classes: {', '.join(absent[:MOST_NAMES])}{more}"
