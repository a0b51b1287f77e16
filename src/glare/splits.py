"""Which labelled images are for training a probe and which for testing it."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch

from glare.data.shards import SPLIT_NAMES
from glare.errors import UserError

INNER_PARTS, MOST_PARTS = 5, 10
"""Parts of the training images where they are not grouped."""


@dataclass(frozen=True)
class Fold:
    """Indices of images, ascending; no image is in both."""

    train: list[int]
    test: list[int]


def k_fold(num_images: int, folds: int, *, seed: int) -> list[Fold]:
    """Every image is tested once, in one of ``folds`` random parts whose sizes differ by one at most.

    Raises:
        UserError: fewer than 2 folds, or more folds than images.
    """
    if not 2 <= folds <= num_images:
        raise UserError(f"{num_images} images cannot make {folds} folds; give at least 2, and an image for each")
    return [_without(part, range(num_images)) for part in _parts(range(num_images), folds, seed=seed)]


def leave_one_group_out(groups: Sequence[str]) -> list[Fold]:
    """One fold for each group in alphabetical order, which tests it and trains on all others.

    Args:
        groups: name of the group of each image.

    Raises:
        UserError: fewer than 2 groups.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise UserError(
            f"all images are in one group ({names[0] if names else 'there are none'}), which leaves nothing to train "
            "on; group them by something that differs, or leave --group-by out"
        )
    return [_without(part, range(len(groups))) for part in _by_group(range(len(groups)), groups)]


def split_folders(names: Sequence[str]) -> list[str]:
    """The outermost folders of images that are called like a split (train, val, test), in that order."""
    found = {name.partition("/")[0] for name in names if "/" in name}
    return [name for usual in SPLIT_NAMES.values() for name in usual if name in found]


def group_of(name: str, pattern: str) -> str:
    """The group of an image.

    Args:
        name: its file name, with folders if there are any.
        pattern: ``prefix``: its stem up to the first ``_`` or ``-``; ``folder``: its parent folder; else a regular
            expression with one pair of parentheses, which is searched in ``name`` and finds the group in them.

    Raises:
        UserError: no regular expression with one pair of parentheses, or the name does not match.
    """
    path = PurePath(name)
    if pattern == "folder":
        return path.parent.as_posix()
    if pattern == "prefix":
        return re.split("[_-]", path.stem, maxsplit=1)[0]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--group-by {pattern!r} is no regular expression ({error}), so {name} has no group; "
            "give one, or prefix, or folder"
        ) from error
    if expression.groups != 1:
        raise UserError(
            f"--group-by {pattern!r} has {expression.groups} pairs of parentheses, so {name} has no group; "
            "give a regular expression with one pair around the group, or prefix, or folder"
        )
    match = expression.search(name)
    if match is None or match[1] is None:
        raise UserError(f"--group-by {pattern!r} finds no group in {name}; give an expression that every name matches")
    return match[1]


def inner_folds(train: Sequence[int], groups: Sequence[str] | None, *, seed: int) -> list[list[int]]:
    """Parts of the training images of one fold, each to be left out once when a setting is chosen.

    Args:
        train: indices of the images.
        groups: name of the group of every image of the data set, or None where images are not grouped.
        seed: of the random parts.

    Returns:
        The groups among ``train`` where there are 2 or more, put together to 10 parts where there are more; else 5
        random parts, or one for each image where there are fewer than 5.
    """
    by_group = [] if groups is None else _by_group(train, groups)
    parts = [sorted(itertools.chain(*by_group[start::MOST_PARTS])) for start in range(min(MOST_PARTS, len(by_group)))]
    return parts if len(parts) > 1 else _parts(train, min(INNER_PARTS, len(train)), seed=seed)


def _by_group(images: Sequence[int], groups: Sequence[str]) -> list[list[int]]:
    names = sorted({groups[image] for image in images})
    return [sorted(image for image in images if groups[image] == name) for name in names]


def _parts(images: Sequence[int], count: int, *, seed: int) -> list[list[int]]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(images[index] for index in order[part::count]) for part in range(count)]


def _without(test: list[int], images: Sequence[int]) -> Fold:
    held_out = set(test)
    return Fold(train=[image for image in images if image not in held_out], test=test)
