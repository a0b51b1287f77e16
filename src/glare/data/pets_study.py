"""The split of a study on few labels (SimMIM on Oxford-IIIT Pet): 1,000 random test images, nested training budgets.

The study leaves the given halves aside, draws 1,000 of the 7,349 images to test on and trains on 250, 500, 1,000,
2,000, 4,000 or 6,000 of the others. It gives no seed and does not say whether a smaller set is part of a larger one;
here it is, so that budgets differ in nothing but their size.
"""

import re
from collections.abc import Sequence

import torch

from glare.errors import UserError
from glare.runtime import seeded

PREFIX = "study"
STUDY_TEST = f"{PREFIX}:test"
TEST_IMAGES = 1000
BUDGETS = (250, 500, 1000, 2000, 4000, 6000)
SPLIT = re.compile(rf"{STUDY_TEST}|{PREFIX}:([1-9][0-9]*)(?::([0-9]+))?")


def is_study(split: str) -> bool:
    """Whether a split is one of the study, by its name."""
    return split.split(":")[0] == PREFIX


def study_split(names: Sequence[str], split: str) -> list[str]:
    """The names of ``study:test`` or ``study:<budget>[:seed]``, seed 0 where none is given, in sorted order.

    What is drawn depends on the set of names and on the seed alone. The test images are the same for all seeds and in
    no budget; a budget is part of every larger one of its seed.

    Raises:
        UserError: ``split`` is not of this form, or there are fewer images.
    """
    match = SPLIT.fullmatch(split)
    if match is None or (match[1] is not None and match[1] not in map(str, BUDGETS)):
        raise UserError(
            f"oxford_pets has no split {split!r}; the study's are study:test and study:N with N of "
            f"{', '.join(map(str, BUDGETS))}, or study:N:SEED"
        )
    budget, seed = (int(number or 0) for number in match.groups())
    needed = TEST_IMAGES + budget
    if len(names) < needed:
        raise UserError(f"split {split!r} needs {needed:,} images, the list has {len(names):,}; use the whole archive")
    shuffled = _shuffled(sorted(names), seed=0)
    if split == STUDY_TEST:
        return sorted(shuffled[:TEST_IMAGES])
    return sorted(_shuffled(shuffled[TEST_IMAGES:], seed=seed)[:budget])


def _shuffled(names: list[str], *, seed: int) -> list[str]:
    order = torch.randperm(len(names), generator=seeded(seed, len(names)))
    return [names[index] for index in order.tolist()]
